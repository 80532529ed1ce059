//! Generates the message types and ttrpc service from `proto/`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out_dir = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out_dir)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            gen_mod: false,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated list of modules begins with an inner attribute, which `include!` does not take.
    std::fs::write(
        std::path::Path::new(&out_dir).join("mod.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )?;
    Ok(())
}
