//! The OCI runtime spec as the agent reads it. The agent's manifest names this crate `oci-spec`,
//! and it looks like that one: [`runtime`] holds its types, all but `Spec` and `Process`, which are
//! our own.
//!
//! `oci-spec` checks `execCPUAffinity` with a regular expression, and parses what belongs to other
//! operating systems. Both are a third of an executable that every guest unpacks into its memory;
//! the agent uses neither. Read-only: nothing here writes a spec.

pub mod runtime;
