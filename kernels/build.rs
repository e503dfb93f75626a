//! Compiles the kernels in `cuda/`: with the feature `cuda` for GPUs, with `emulated` for this machine's CPU.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Ampere and Ada to the instruction, Hopper with its own, and what later GPUs translate when they load it.
const TARGETS: [&str; 4] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
];

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=cuda");
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    let listed: io::Result<Vec<PathBuf>> =
        fs::read_dir("cuda").and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut sources = listed.map_err(|error| format!("kernels/cuda: {error}"))?;
    sources.retain(|path| path.extension() == Some(OsStr::new("cu")));
    sources.sort();
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_for_gpus(&sources)?;
    }
    #[cfg(feature = "emulated")]
    compile_for_the_cpu(&sources);
    Ok(())
}

/// One module a source, embedded by a list of them.
fn compile_for_gpus(sources: &[PathBuf]) -> Result<(), String> {
    for variable in ["CUDA_HOME", "CUDA_PATH", "NVCC"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let nvcc = match (env::var_os("NVCC"), env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH"))) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (None, Some(home)) => Path::new(&home).join("bin/nvcc"),
        (None, None) => PathBuf::from("nvcc"),
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let mut modules = Vec::new();
    for source in sources {
        let module = out.join(source.file_name().unwrap_or_default()).with_extension("fatbin");
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-lineinfo", "-fatbin", "-Xfatbin=-compress-all", "-Werror=all-warnings"]);
        // Registers that go to memory are a bug of a kernel.
        command.args(["-Xptxas=-warn-spills,-Werror", "-o"]).arg(&module).arg(source);
        command.args(TARGETS.map(|target| format!("-gencode={target}")));
        // As many targets at a time as there are cores.
        command.arg("--threads=0");
        match command.status() {
            Ok(status) if status.success() => modules.push(format!("module!({module:?})")),
            Ok(status) => return Err(format!("{} {}: {status}", nvcc.display(), source.display())),
            Err(error) => {
                return Err(format!(
                    "{}: {error}. The feature `cuda` takes a CUDA toolkit of version 13.0 or later: name its folder by \
                     CUDA_HOME, or let kernels/cuda/toolkit.sh fetch one",
                    nvcc.display()
                ));
            }
        }
    }
    let list = out.join("modules.rs");
    fs::write(&list, format!("&[{}]", modules.join(", "))).map_err(|error| format!("{}: {error}", list.display()))
}

#[cfg(feature = "emulated")]
fn compile_for_the_cpu(sources: &[PathBuf]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).warnings_into_errors(true);
    // Of CUDA: pragmas, and functions that not every kernel uses. Fibers jump between stacks.
    build.flags(["-Wno-unknown-pragmas", "-Wno-unused-function", "-U_FORTIFY_SOURCE"]);
    // Kernels are found by the names that they register when they are loaded.
    build.link_lib_modifier("+whole-archive");
    build.file("cuda/emulate.cpp").flags(["-x", "c++"]).files(sources).compile("plumb_emulated_kernels");
}
