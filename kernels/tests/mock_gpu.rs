#![cfg(all(feature = "cuda", feature = "emulation"))]
use kernels::cuda::Gpu;
use kernels::cuda::checks::{self, Finding};

#[test]
fn all_families() {
    let gpu = Gpu::open(0).unwrap_or_else(|error| panic!("{error}"));
    println!("{:?}", gpu.properties());
    let only = std::env::var("ONLY").unwrap_or_default();
    for (name, run) in checks::FAMILIES.iter().filter(|(name, _)| name.contains(&only)) {
        let start = std::time::Instant::now();
        match checks::run(&gpu, *run, 7) {
            Err(error) => println!("{name}: ERROR {error}"),
            Ok(findings) => {
                let wrong: Vec<_> = findings.iter().filter(|f| !f.passes()).map(Finding::to_string).collect();
                println!(
                    "{name}: {} of {} wrong, {:?} {:#?}",
                    wrong.len(),
                    findings.len(),
                    start.elapsed(),
                    &wrong[..wrong.len().min(5)]
                );
            }
        }
    }
}
