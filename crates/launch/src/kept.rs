//! [`KeptKernel`]: a bound kernel as data, for another process.
//!
//! What a process worked out (which program for which sizes, its text, its machine code, its arguments) is not worked out again by the
//! next one: machine code is loaded, and arguments are put in their places. What follows from addresses is left open, as in
//! [`BoundKernel::move_to`].

use crate::loader::{BoundKernel, Movable};
use serde::{Deserialize, Serialize};
use tilewright_base::{Error, Result};
use tilewright_cuda::{Args, Gpu, LaunchShape, Module, TensorMapSpec};

/// A bound kernel that needs no program, compiler or text; see the module's head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptKernel {
    /// Number of its machine code in [`KeptModules`].
    pub module: usize,
    entry: String,
    shape: LaunchShape,
    arguments: Vec<Kept>,
}

/// An argument.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Kept {
    /// A value.
    Bytes(Vec<u8>),
    /// The address of an operand.
    Address(usize),
    /// A tensor map that begins so many bytes behind the start of an operand.
    Map { operand: usize, from_start: u64, spec: TensorMapSpec },
}

/// The bytes of a tensor map.
const MAP_BYTES: usize = 128;

/// Machine code of several kernels, each once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeptModules {
    /// Names, for messages, and machine code.
    pub code: Vec<(String, Vec<u8>)>,
}

impl KeptModules {
    fn number(&mut self, name: &str, cubin: &[u8]) -> usize {
        let known = self.code.iter().position(|(_, code)| code == cubin);
        known.unwrap_or_else(|| {
            self.code.push((name.to_owned(), cubin.to_vec()));
            self.code.len() - 1
        })
    }

    /// Loads all of it.
    ///
    /// # Errors
    /// The user's for what is no machine code; the driver's.
    pub fn load(&self, gpu: &Gpu) -> Result<Vec<Module>> {
        self.code.iter().map(|(name, cubin)| gpu.load_cubin(name, cubin)).collect()
    }
}

impl BoundKernel {
    /// The kernel as data, with its machine code in `modules`. None where it launches nothing, and where the driver translated
    /// it from assembly text.
    pub fn keep(&self, modules: &mut KeptModules) -> Option<KeptKernel> {
        let launch = self.launch.as_ref()?;
        let function = launch.function();
        let compiled = function.compiled()?;
        let device = function.gpu().properties();
        if !compiled.arch().runs_on(device.major, device.minor) {
            return None;
        }
        let mut arguments: Vec<Kept> =
            launch.args().into_iter().map(|bytes| Kept::Bytes(bytes.to_vec())).collect();
        for Movable { index, operand, map } in &self.movable {
            *arguments.get_mut(*index)? = match map {
                None => Kept::Address(*operand),
                Some((spec, from_start)) => Kept::Map {
                    operand: *operand,
                    from_start: *from_start,
                    spec: TensorMapSpec { address: 0, ..(**spec).clone() },
                },
            };
        }
        let module = modules.number(compiled.name(), compiled.cubin());
        Some(KeptKernel { module, entry: function.name().into(), shape: self.shape?, arguments })
    }

    /// Whether it launches nothing.
    pub fn is_empty(&self) -> bool {
        self.launch.is_none()
    }

    /// The kernel again, of `modules` as they were loaded. It is to be moved before it is launched.
    ///
    /// # Errors
    /// A bug when it does not fit its machine code; the driver's.
    pub fn restore(kept: &KeptKernel, modules: &[Module]) -> Result<BoundKernel> {
        let missing = || Error::bug(format!("no machine code for kernel {}", kept.entry));
        let function = modules.get(kept.module).ok_or_else(missing)?.function(&kept.entry)?;
        let (mut args, mut movable) = (Args::new(), Vec::new());
        for (index, argument) in kept.arguments.iter().enumerate() {
            args = match argument {
                Kept::Bytes(bytes) => args.bytes(bytes),
                Kept::Address(_) => args.value(0u64),
                Kept::Map { .. } => args.bytes(&[0; MAP_BYTES]),
            };
            let (operand, map) = match argument {
                Kept::Bytes(_) => continue,
                Kept::Address(operand) => (*operand, None),
                Kept::Map { operand, from_start, spec } => {
                    (*operand, Some((Box::new(spec.clone()), *from_start)))
                }
            };
            movable.push(Movable { index, operand, map });
        }
        let launch = function.prepare(&kept.shape, &args)?;
        Ok(BoundKernel { launch: Some(launch), shape: Some(kept.shape), movable })
    }
}
