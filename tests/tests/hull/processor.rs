//! The processor as programs see it: its registers are theirs.
#![cfg(target_arch = "x86_64")]

use hull_tests::{Hull, on_every_machine, registers_program};

on_every_machine!(vector_registers_survive_calls_forks_signals_and_threads);

fn vector_registers_survive_calls_forks_signals_and_threads(machine: &'static str) {
    let hull = Hull::on(machine);
    let mount = format!("{}:/registers:ro", registers_program().display());
    let output = hull.run(&["-v", &mount], &["/registers"]).ok();
    assert_eq!(output.text(), "ok");
}
