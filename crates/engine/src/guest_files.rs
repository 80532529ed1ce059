//! Where the guest's files are: kernels and the initramfs with the agent. Looked up by `run`,
//! `check` and `kernel`; never reads a kernel itself.

use std::path::{Path, PathBuf};

use hull_machine::{Choice, Host, Kind, Requirements};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::values::Machine;

/// The directory with the guest's files.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    directory: PathBuf,
}

/// What the build of a kernel says of it, in `kernel-ARCH.json` beside it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KernelInformation {
    /// Release, as `uname -r` prints it.
    #[serde(default)]
    pub version: String,
    /// Hash of the complete configuration.
    #[serde(default)]
    pub config_hash: String,
    /// Hash of all that went into the build.
    #[serde(default)]
    pub inputs_hash: String,
}

impl GuestFiles {
    /// The configured directory, or `../share/hull` beside the executable.
    pub fn locate(config: &Config) -> Result<GuestFiles> {
        if let Some(directory) = &config.guest_dir {
            return Ok(GuestFiles {
                directory: directory.clone(),
            });
        }
        let directory = config
            .executable
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/"))
            .join("share/hull");
        Ok(GuestFiles { directory })
    }

    /// Where the installed kernel for this kind of machine is, or would be.
    pub fn kernel_path(&self, kind: Kind) -> PathBuf {
        self.directory
            .join(format!("kernel-{}", kind.kernel_architecture()))
    }

    /// What a machine is chosen by: the given kernel, the configured one, or the installed ones.
    pub fn requirements(&self, config: &Config, given: Option<&Path>) -> Requirements {
        let mut host = Host {
            uml_kernel: Some(self.kernel_path(Kind::Uml)),
            native_kernel: Some(self.kernel_path(Kind::Qemu)),
            data_directory: config.data_dir.clone(),
        };
        if let Some(given) = given.or(config.kernel.as_deref()) {
            let given = Some(given.to_owned());
            // A kernel fits one kind of machine only: auto must not try it with the other.
            if given.as_deref().is_some_and(is_user_mode_kernel) {
                (host.uml_kernel, host.native_kernel) = (given, None);
            } else {
                (host.uml_kernel, host.native_kernel) = (None, given);
            }
        }
        Requirements {
            hardware_isolation: config.hardware_isolation,
            host,
        }
    }

    /// Picks a machine and its kernel.
    pub fn choose(
        &self,
        config: &Config,
        machine: Option<Machine>,
        given: Option<&Path>,
    ) -> Result<Choice> {
        let requested = machine.unwrap_or(config.machine).kind();
        let given = given.or(config.kernel.as_deref());
        let given = match given {
            Some(path) => Some(kernel_file(path)?),
            None => None,
        };
        if given.is_none() {
            // A missing kernel is better said here, where the command that builds it is known.
            match requested {
                Some(kind) => {
                    self.kernel(kind)?;
                }
                None => {
                    self.any_kernel()?;
                }
            }
        }
        let mut choice =
            hull_machine::choose(requested, &self.requirements(config, given.as_deref()))?;
        choice.kernel = std::path::absolute(&choice.kernel)
            .context(|| format!("use kernel {}", choice.kernel.display()))?;
        Ok(choice)
    }

    /// The installed kernel for this kind of machine.
    pub fn kernel(&self, kind: Kind) -> Result<PathBuf> {
        let path = self.kernel_path(kind);
        if path.is_file() {
            return Ok(path);
        }
        Err(Error::new(format!(
            "no guest kernel for machine {kind}: there is no {}",
            path.display()
        ))
        .hint(
            "`make kernels` in hull's source directory builds it, or give one with --kernel FILE",
        ))
    }

    /// The kernel that `auto` would boot of those that are installed.
    pub fn any_kernel(&self) -> Result<PathBuf> {
        let kinds = hull_machine::kernels();
        let mut kernels = kinds
            .iter()
            .flat_map(|(_, kinds)| kinds)
            .map(|kind| self.kernel(*kind));
        let first = kernels
            .next()
            .unwrap_or_else(|| Err(Error::new("hull is built without any machine")));
        first.or_else(|error| kernels.find_map(Result::ok).ok_or(error))
    }

    /// The initramfs with the agent.
    pub fn initramfs(&self) -> Result<PathBuf> {
        let path = self.initramfs_path();
        if path.is_file() {
            return Ok(path);
        }
        Err(Error::new(format!(
            "no initramfs for the guest: there is no {}",
            path.display()
        ))
        .hint("`make guest` in hull's source directory builds it"))
    }

    /// Where the initramfs is, or would be.
    pub fn initramfs_path(&self) -> PathBuf {
        self.directory.join("initramfs")
    }

    /// What the build said of a kernel; empty when it left nothing.
    pub fn information(kernel: &Path) -> Result<KernelInformation> {
        let mut path = kernel.as_os_str().to_owned();
        path.push(".json");
        let path = PathBuf::from(path);
        match std::fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).context(|| format!("read {}", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Ok(KernelInformation::default())
            }
            Err(error) => Err(error).context(|| format!("read {}", path.display())),
        }
    }
}

/// A kernel that a user names: absolute, and a file.
pub fn kernel_file(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).context(|| format!("use kernel {}", path.display()))?;
    match std::fs::metadata(&path) {
        Ok(file) if file.is_file() => match may_be_kernel(&path) {
            true => Ok(path),
            false => Err(Error::new(format!(
                "cannot use kernel {}: it is no kernel",
                path.display()
            ))),
        },
        Ok(_) => Err(Error::new(format!(
            "cannot use kernel {}: it is not a file",
            path.display()
        ))),
        Err(error) => Err(error).context(|| format!("use kernel {}", path.display())),
    }
}

/// Whether a file begins as kernels do: an ELF executable, an x86 or arm64 image, a compressed one.
/// One that cannot be read is left to those who say why.
fn may_be_kernel(path: &Path) -> bool {
    use std::io::Read;
    let mut start = Vec::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(0x206).read_to_end(&mut start))
        .is_ok();
    let has = |offset: usize, magic: &[u8]| {
        start
            .get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    !read
        || has(0, b"\x7fELF")
        || has(0, &[0x1f, 0x8b])
        || has(0, b"MZ")
        || has(0x202, b"HdrS")
        || has(56, b"ARM\x64")
}

/// Whether a kernel is one for kind `uml`: an executable of the host. Others are not marked
/// executable, or are compressed.
fn is_user_mode_kernel(path: &Path) -> bool {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    let mut magic = [0; 4];
    std::fs::File::open(path).is_ok_and(|mut file| {
        let executable = file
            .metadata()
            .is_ok_and(|data| data.permissions().mode() & 0o111 != 0);
        executable && file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF"
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn guest() -> (tempfile::TempDir, GuestFiles) {
        let directory = tempfile::tempdir().unwrap();
        let guest = GuestFiles {
            directory: directory.path().to_owned(),
        };
        (directory, guest)
    }

    #[test]
    fn a_missing_kernel_names_the_command_that_builds_it() {
        let (_directory, guest) = guest();
        let error = guest.kernel(Kind::Uml).unwrap_err();
        assert!(error.message.contains("kernel-um"), "{}", error.message);
        assert!(error.hint.as_deref().unwrap().contains("make kernels"));
        assert!(guest.initramfs().is_err());
    }

    #[test]
    fn a_given_kernel_is_for_one_kind_of_machine() {
        let (directory, guest) = guest();
        let config = Config::defaults().unwrap();
        let path = directory.path().join("linux");
        std::fs::write(&path, b"\x7fELF and more").unwrap();
        let requirements = guest.requirements(&config, Some(&path));
        assert_eq!(
            (
                requirements.host.uml_kernel,
                requirements.host.native_kernel
            ),
            (None, Some(path.clone()))
        );
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let requirements = guest.requirements(&config, Some(&path));
        assert_eq!(
            (
                requirements.host.uml_kernel,
                requirements.host.native_kernel
            ),
            (Some(path), None)
        );
    }

    #[test]
    fn information_of_a_kernel() {
        let (directory, guest) = guest();
        let path = guest.kernel_path(Kind::Uml);
        assert_eq!(GuestFiles::information(&path).unwrap().version, "");
        std::fs::write(
            directory.path().join("kernel-um.json"),
            r#"{"version": "7.3", "more": 1}"#,
        )
        .unwrap();
        assert_eq!(GuestFiles::information(&path).unwrap().version, "7.3");
        std::fs::write(directory.path().join("kernel-um.json"), "{").unwrap();
        assert!(GuestFiles::information(&path).is_err());
    }
}
