//! Chooses a machine: the requested kind, or the first that works here, with the reason. Called at
//! each start, so it checks little.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::probe::Works;
use crate::{Backend, Error, Features, Kind};

/// Properties of the host that the choice depends on.
#[derive(Debug, Clone)]
pub struct Host {
    /// The guest kernel for kind `uml`, if there is one.
    pub uml_kernel: Option<PathBuf>,
    /// The guest kernel for kinds `kvm` and `qemu`, if there is one.
    pub native_kernel: Option<PathBuf>,
    /// hull's data directory, where the result of the KVM probe is cached.
    pub data_directory: PathBuf,
}

impl Host {
    /// The guest kernel for a kind.
    pub(crate) fn kernel(&self, kind: Kind) -> Result<PathBuf, Error> {
        let why = |why| Error::DoesNotWork { kind, why };
        let path = match kind {
            Kind::Uml => &self.uml_kernel,
            Kind::Kvm | Kind::Qemu => &self.native_kernel,
        };
        let Some(path) = path else {
            let architecture = kind.kernel_architecture();
            return Err(why(format!("there is no guest kernel for {architecture}")));
        };
        let path = path.clone();
        match std::fs::metadata(&path) {
            Ok(found) if found.is_file() => Ok(path),
            Ok(_) => Err(why(format!(
                "its guest kernel {} is not a file",
                path.display()
            ))),
            Err(error) => Err(why(format!(
                "its guest kernel {} cannot be read: {error}",
                path.display()
            ))),
        }
    }
}

/// Requirements for a machine.
#[derive(Debug, Clone)]
pub struct Requirements {
    /// Isolation by hardware virtualization.
    pub hardware_isolation: bool,
    /// The host that it runs on.
    pub host: Host,
}

/// A machine that works here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Its kind.
    pub kind: Kind,
    /// Whether it uses hardware virtualization.
    pub hardware: bool,
    /// The guest kernel that it boots.
    pub kernel: PathBuf,
    /// The reason for the choice, for display.
    pub why: String,
}

impl Choice {
    /// The backend that starts it.
    pub fn backend(&self) -> &'static dyn Backend {
        self.kind.backend()
    }

    /// Features of its kind.
    pub fn features(&self) -> Features {
        self.backend().features()
    }
}

/// Chooses a machine. `requested` is `None` for `auto`: the first kind of [`Kind::ALL`] that works.
///
/// # Errors
/// For a requested kind, the error of its probe, or [`Error::NotHardware`] if hardware isolation is
/// required and missing; for `auto`, [`Error::NoMachine`] if no kind qualifies.
pub fn choose(requested: Option<Kind>, requirements: &Requirements) -> Result<Choice, Error> {
    if let Some(kind) = requested {
        return Ok(attempt(kind, requirements)?.choice(kind, "asked for".into()));
    }
    let mut against = Vec::new();
    for kind in Kind::ALL {
        match attempt(kind, requirements) {
            Ok(works) => {
                let why = format!("{} ({})", works.why, against.join("; "));
                return Ok(works.choice(kind, why));
            }
            Err(Error::DoesNotWork { kind, why }) => against.push(format!("{kind}: {why}")),
            Err(Error::NotHardware { kind }) => {
                against.push(format!("{kind}: not hardware isolation"));
            }
            Err(error @ Error::NoQemu { .. }) => against.push(format!("{kind}: {error}")),
            Err(other) => return Err(other),
        }
    }
    Err(Error::NoMachine(against.join("; ")))
}

fn attempt(kind: Kind, requirements: &Requirements) -> Result<Works, Error> {
    let works = kind.backend().probe(&requirements.host)?;
    if requirements.hardware_isolation && !works.hardware {
        return Err(Error::NotHardware { kind });
    }
    Ok(works)
}

impl Works {
    fn choice(self, kind: Kind, why: String) -> Choice {
        Choice {
            kind,
            hardware: self.hardware,
            kernel: self.kernel,
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::probe;

    fn requirements(directory: &std::path::Path) -> Requirements {
        let kernel = directory.join("kernel");
        std::fs::write(&kernel, "").unwrap();
        Requirements {
            hardware_isolation: false,
            host: Host {
                uml_kernel: Some(kernel),
                native_kernel: None,
                data_directory: directory.to_owned(),
            },
        }
    }

    #[test]
    fn a_kind_that_does_not_work_is_refused_and_auto_reports_why_it_was_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let requirements = requirements(directory.path());
        // There is no kernel for it, or no KVM.
        let error = choose(Some(Kind::Kvm), &requirements).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("machine kind kvm does not work on this host: ")
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
        requirements.host.uml_kernel = Some(directory.path().join("none"));
        let error = choose(Some(Kind::Uml), &requirements).unwrap_err();
        assert!(error.to_string().contains("none cannot be read"), "{error}");
    }
}
