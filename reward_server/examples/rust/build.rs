//! Generates the contract's types and server from `protos/`. protox compiles them, so that no protoc is needed.

use std::{env, error::Error, fs, path::Path};

use prost::Message as _;

const PROTOS: &str = "../../../protos";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTOS}");
    let descriptors = protox::compile(["rlhf/reward/v1/reward.proto"], [PROTOS])?;
    // Reflection serves the contract as it was compiled.
    let out = Path::new(&env::var("OUT_DIR")?).join("reward.binpb");
    fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Maps in the order of their keys: the digest of a sample is over its encoding.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
