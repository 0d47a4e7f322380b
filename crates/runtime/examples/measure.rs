//! Prints this machine and its measured ceilings: `cargo run --release --example measure`.
use tilewright_runtime::{Pool, measure};
use tilewright_target::Cpu;

fn main() -> tilewright_base::Result<()> {
    let mut cpu = Cpu::detect(0)?;
    cpu.ceilings = measure(&cpu, &Pool::new(cpu.threads))?;
    println!("{cpu:#?}");
    Ok(())
}
