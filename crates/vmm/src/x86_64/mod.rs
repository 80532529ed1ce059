//! What is x86_64's: addresses, the state in which the kernel is entered, what it is told of the
//! machine, the interrupt controller, and the state of virtual CPUs.

pub mod boot;
pub mod cpuid;
pub mod ioapic;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod vcpu_state;
