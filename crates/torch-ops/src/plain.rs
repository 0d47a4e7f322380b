//! Kernels that are written by hand on plain memory: for frontends that have no tensors of PyTorch's (`xla-ffi`).
//!
//! A [`Work`] says what is to be done with what lies at some addresses: on a GPU as launches that the frontend does in its own
//! stream, on the processor at once.

use crate::host::{Number, with_number};
use crate::ops::{dropout, optimizers};
use crate::written::{Set, Text, element};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Arch, Args, CompileRequest};

pub use crate::ops::optimizers::{Entry, Numbers, Rule};

/// A kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    text: Text,
    /// Its name in the text.
    pub entry: &'static str,
    set: Set,
}

impl Kernel {
    /// How its text is compiled.
    pub fn request(&self, arch: Arch) -> CompileRequest {
        self.text.request(arch, &self.set)
    }
}

/// A launch of a kernel.
pub struct Launch {
    /// What is launched.
    pub kernel: Kernel,
    /// Blocks of the grid.
    pub blocks: u64,
    /// Threads of a block.
    pub threads: u32,
    /// What the kernel takes.
    pub args: Args,
}

/// What is to be done, with addresses.
pub enum Work {
    /// A step of an optimizer, in place.
    Step {
        /// Which step.
        rule: Rule,
        /// Of weights and gradients; the rest is as wide as it is computed.
        dtype: DType,
        /// Those that are known; the rate is read from `rate`.
        numbers: Numbers,
        /// The number of this step, an `f32`.
        count: u64,
        /// The rate, an `f32`.
        rate: u64,
        /// What gradients are multiplied by, an `f32`.
        factor: u64,
        /// Whether there are masters.
        masters: bool,
        /// The parameters.
        entries: Vec<Entry>,
    },
    /// Dropout.
    Dropout {
        /// Of all but the key.
        dtype: DType,
        /// The share that is dropped.
        share: f64,
        /// Operand, residual (or 0), result, key (a `u64`).
        places: [u64; 4],
        /// Of each but the key.
        elements: i64,
    },
}

impl Work {
    /// Refuses what kernels cannot compute with.
    ///
    /// # Errors
    /// The user's.
    pub fn check(&self) -> Result<()> {
        match self {
            Work::Step { numbers, .. } => numbers.check(),
            Work::Dropout { share, .. } if (0.0..=1.0).contains(share) => Ok(()),
            Work::Dropout { share, .. } => Err(Error::user(format!("a share of {share}"))),
        }
    }

    /// The launches that do it on a GPU, one after the other.
    ///
    /// # Errors
    /// What the kernels do not do.
    pub fn launches(&self) -> Result<Vec<Launch>> {
        let none = ("", 0);
        match self {
            Work::Step { rule, dtype, numbers, count, rate, factor, masters, entries } => {
                let (step, rate, factor, numbers) = (*count, *rate, *factor, *numbers);
                let rate_is_double = false;
                let head = optimizers::Head { step, rate, factor, found: 0, rate_is_double, numbers };
                let entry = match rule {
                    Rule::AdamW => "adamw",
                    Rule::Lion => "lion",
                };
                let launch = |table: optimizers::Table| {
                    let [bytes, count] = optimizers::table_definitions(table.places);
                    let set = [element(*dtype)?, bytes, count, ("TW_MASTER", (*masters).into())];
                    Ok(Launch {
                        kernel: Kernel { text: Text::Optimizers, entry, set },
                        blocks: table.blocks,
                        threads: optimizers::THREADS,
                        args: Args::new().bytes(&table.bytes),
                    })
                };
                optimizers::tables(entries, &head)?.into_iter().map(launch).collect()
            }
            Work::Dropout { dtype, share, places, elements } => {
                let set = [element(*dtype)?, none, none, none];
                let kernel = Kernel { text: Text::Dropout, entry: "dropout", set };
                let (args, blocks) = dropout::arguments(*places, *share, *elements);
                Ok(vec![Launch { kernel, blocks, threads: dropout::THREADS, args }])
            }
        }
    }

    /// Does it on the processor.
    ///
    /// # Errors
    /// What the kernels do not do.
    ///
    /// # Safety
    /// At each address are as many elements as this says, of its types, on the processor; nobody else uses them meanwhile, and what is
    /// written lies apart from everything else.
    pub unsafe fn on_host(&self, threads: usize) -> Result<()> {
        match self {
            Work::Step { dtype, .. } => with_number!(*dtype, step(self, threads)),
            Work::Dropout { dtype, .. } => with_number!(*dtype, dropped(self, threads)),
        }
    }
}

/// Elements at an address; none where there is no address.
fn read<'a, T: Number>(address: u64, elements: i64) -> &'a [T] {
    if address == 0 || elements <= 0 {
        return &[];
    }
    // SAFETY: `Work::on_host`'s contract; the slice is used while it runs.
    unsafe { std::slice::from_raw_parts(address as *const T, elements as usize) }
}

/// The same, to be written.
fn write<'a, T: Number>(address: u64, elements: i64) -> &'a mut [T] {
    if address == 0 || elements <= 0 {
        return &mut [];
    }
    // SAFETY: `Work::on_host`'s contract; the slice is used while it runs, and is the only one there.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, elements as usize) }
}

fn step<T: Number>(work: &Work, threads: usize) -> Result<()> {
    let Work::Step { rule, numbers, count, rate, factor, entries, .. } = work else {
        return Err(Error::bug("no step"));
    };
    let number = |address: u64| f64::from(read::<f32>(address, 1).first().copied().unwrap_or(1.0));
    let numbers = Numbers { rate: number(*rate), ..*numbers };
    let jobs = entries.iter().map(|&Entry { places, elements }| {
        let [weights, gradients, first, second, masters, maxima] = places;
        optimizers::Job {
            weights: write::<T>(weights, elements),
            gradients: read::<T>(gradients, elements),
            first: write(first, elements),
            second: write(second, elements),
            masters: write(masters, elements),
            maxima: write(maxima, elements),
        }
    });
    let (count, factor) = (number(*count), number(*factor));
    optimizers::step_on_slices(threads, *rule, jobs.collect(), count, factor, numbers);
    Ok(())
}

fn dropped<T: Number>(work: &Work, threads: usize) -> Result<()> {
    let Work::Dropout { share, places: [x, residual, y, key], elements, .. } = work else {
        return Err(Error::bug("no dropout"));
    };
    let words: &[u32] = {
        // SAFETY: `Work::on_host`'s contract: a key has eight bytes. XLA and PyTorch align what they allocate further than this.
        unsafe { std::slice::from_raw_parts(*key as *const u32, 2) }
    };
    let key = u64::from(words[0]) | u64::from(words[1]) << 32;
    let rest = (*residual != 0).then(|| read::<T>(*residual, *elements));
    let (x, y) = (read::<T>(*x, *elements), write::<T>(*y, *elements));
    dropout::drop_on_slices(threads, x, rest, y, key, *share);
    Ok(())
}
