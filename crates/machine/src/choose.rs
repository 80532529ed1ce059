//! Choosing a machine: the kind asked for, or the first that works here, with the reason in words.
//! Called at the start of each `hull run`, so it looks at little; what takes time (KVM) is probed
//! once and kept.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::probe::{self, KvmState};
use crate::{Error, Kind, Machine, qemu, uml};

/// What a machine is wanted for.
#[derive(Debug, Clone)]
pub struct Requirements {
    /// Whether only hardware virtualization will do.
    pub hardware_isolation: bool,
    /// The guest kernel for kind `uml`, if there is one.
    pub uml_kernel: Option<PathBuf>,
    /// The guest kernel for kinds `kvm` and `qemu`, if there is one.
    pub native_kernel: Option<PathBuf>,
    /// hull's data directory, where the answer of the KVM probe is kept.
    pub data_directory: PathBuf,
}

/// A machine that works here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Its kind.
    pub kind: Kind,
    /// Whether hardware virtualization carries it.
    pub hardware: bool,
    /// The guest kernel it boots.
    pub kernel: PathBuf,
    /// Why this one, for people.
    pub why: String,
}

impl Choice {
    /// The machine chosen.
    pub fn machine(&self) -> Result<Box<dyn Machine>, Error> {
        match self.kind {
            Kind::Kvm => Err(Error::KvmNotSupported),
            Kind::Qemu => Ok(Box::new(qemu::Qemu::find(self.hardware)?)),
            Kind::Uml => Ok(Box::new(uml::Uml)),
        }
    }
}

/// Chooses a machine. `requested` is `None` for `auto`: the first of kvm, uml and qemu that works.
pub fn choose(requested: Option<Kind>, requirements: &Requirements) -> Result<Choice, Error> {
    match requested {
        Some(Kind::Kvm) => Err(Error::KvmNotSupported),
        Some(kind) => {
            let found = match kind {
                Kind::Uml => try_uml(requirements)?,
                Kind::Kvm | Kind::Qemu => try_qemu(requirements)?,
            };
            Ok(Choice {
                why: "asked for".into(),
                ..found
            })
        }
        None => {
            let mut against =
                vec!["kvm: hull's own virtual machine monitor is not built yet".to_owned()];
            for attempt in [try_uml, try_qemu] {
                match attempt(requirements) {
                    Ok(found) => {
                        return Ok(Choice {
                            why: format!("{} ({})", found.why, against.join("; ")),
                            ..found
                        });
                    }
                    Err(Error::DoesNotWork { kind, why }) => against.push(format!("{kind}: {why}")),
                    Err(Error::NotHardware { kind }) => {
                        against.push(format!("{kind}: not hardware isolation"))
                    }
                    Err(error @ Error::NoQemu { .. }) => against.push(format!("qemu: {error}")),
                    Err(other) => return Err(other),
                }
            }
            Err(Error::NoMachine(against.join("; ")))
        }
    }
}

fn try_uml(requirements: &Requirements) -> Result<Choice, Error> {
    if requirements.hardware_isolation {
        return Err(Error::NotHardware { kind: Kind::Uml });
    }
    let does_not_work = |why: String| Error::DoesNotWork {
        kind: Kind::Uml,
        why,
    };
    let kernel = kernel(requirements.uml_kernel.as_ref(), Kind::Uml).map_err(does_not_work)?;
    if let Some(why) = probe::tracing_forbidden() {
        return Err(does_not_work(why));
    }
    Ok(Choice {
        kind: Kind::Uml,
        hardware: false,
        kernel,
        why: "the fastest that needs no virtualization".into(),
    })
}

fn try_qemu(requirements: &Requirements) -> Result<Choice, Error> {
    let does_not_work = |why: String| Error::DoesNotWork {
        kind: Kind::Qemu,
        why,
    };
    qemu::find_program()?;
    let kernel = kernel(requirements.native_kernel.as_ref(), Kind::Qemu).map_err(does_not_work)?;
    let kvm = probe::kvm_cached(&requirements.data_directory);
    let hardware = matches!(kvm, KvmState::Works { .. });
    if requirements.hardware_isolation && !hardware {
        return Err(does_not_work(format!("it would emulate: kvm {kvm}")));
    }
    let why = if hardware {
        "KVM works"
    } else {
        "it can emulate, which needs no virtualization"
    };
    Ok(Choice {
        kind: Kind::Qemu,
        hardware,
        kernel,
        why: why.into(),
    })
}

fn kernel(path: Option<&PathBuf>, kind: Kind) -> Result<PathBuf, String> {
    let architecture = kind.kernel_architecture();
    match path {
        None => Err(format!("there is no guest kernel for {architecture}")),
        Some(path) => match std::fs::metadata(path) {
            Ok(found) if found.is_file() => Ok(path.clone()),
            Ok(_) => Err(format!("its guest kernel {} is not a file", path.display())),
            Err(error) => Err(format!(
                "its guest kernel {} cannot be read: {error}",
                path.display()
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn requirements(directory: &std::path::Path) -> Requirements {
        let kernel = directory.join("kernel");
        std::fs::write(&kernel, "").unwrap();
        Requirements {
            hardware_isolation: false,
            uml_kernel: Some(kernel),
            native_kernel: None,
            data_directory: directory.to_owned(),
        }
    }

    #[test]
    fn kvm_is_refused_and_auto_says_why_it_was_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let requirements = requirements(directory.path());
        let error = choose(Some(Kind::Kvm), &requirements).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("machine kind kvm is not supported yet: ")
        );
        if probe::tracing_forbidden().is_none() {
            let choice = choose(None, &requirements).unwrap();
            assert_eq!(choice.kind, Kind::Uml);
            assert!(choice.why.contains("kvm: "), "{}", choice.why);
        }
    }

    #[test]
    fn hardware_isolation_refuses_uml() {
        let directory = tempfile::tempdir().unwrap();
        let requirements = Requirements {
            hardware_isolation: true,
            ..requirements(directory.path())
        };
        let error = choose(Some(Kind::Uml), &requirements).unwrap_err();
        assert!(matches!(error, Error::NotHardware { kind: Kind::Uml }));
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut requirements = requirements(directory.path());
        requirements.uml_kernel = Some(directory.path().join("none"));
        let error = choose(Some(Kind::Uml), &requirements).unwrap_err();
        assert!(error.to_string().contains("none cannot be read"), "{error}");
    }
}
