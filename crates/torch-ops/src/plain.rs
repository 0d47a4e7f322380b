//! Kernels that are written by hand on plain memory: for frontends that have no tensors of PyTorch's (`xla-ffi`).
//!
//! A [`Work`] says what is to be done with what lies at some addresses: on a GPU as launches that the frontend does in its own
//! stream, on the processor at once.

use crate::host::{Number, with_number};
use crate::ops::{bags, dropout, optimizers};
use crate::written::{Set, Text, element};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Arch, Args, CompileRequest};

pub use crate::ops::bags::Mode;
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
    /// Bags of rows of a table, or a gradient.
    Bags {
        /// Which of them.
        part: BagsPart,
        /// Of all floats.
        dtype: DType,
        /// What becomes of the rows of a bag.
        mode: Mode,
        /// What the kernel takes, in its order (`device/bags.cu`); 0 for weights that there are not. Whole numbers are `i32`.
        places: Vec<u64>,
        /// Of the table.
        rows: i64,
        /// Of the table.
        columns: i64,
        /// Rows in all bags.
        positions: i64,
        /// How many bags.
        bags: i64,
        /// The row that does not count.
        padding: i64,
    },
}

/// A kernel of bags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BagsPart {
    /// The bags.
    Forward,
    /// The gradient of the table.
    Table,
    /// The gradient of the weights.
    Weights,
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
            Work::Bags { positions, bags, rows, columns, mode, .. } => {
                let places = if *mode == Mode::Max { bags.checked_mul(*columns) } else { Some(0) };
                let most = [*positions, *bags, *rows, places.unwrap_or(i64::MAX)];
                if most.into_iter().all(|n| i32::try_from(n).is_ok()) {
                    return Ok(());
                }
                Err(Error::unsupported("bags of more than 2^31 rows, positions or maxima"))
            }
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
                let head =
                    optimizers::Head { step, rate, factor, found: 0, rate_is_double, numbers };
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
                optimizers::tables(entries, &head, optimizers::PIECE)?
                    .into_iter()
                    .map(launch)
                    .collect()
            }
            Work::Dropout { dtype, share, places, elements } => {
                let set = [element(*dtype)?, none, none, none];
                let kernel = Kernel { text: Text::Dropout, entry: "dropout", set };
                let (args, blocks) = dropout::arguments(*places, *share, *elements);
                Ok(vec![Launch { kernel, blocks, threads: dropout::THREADS, args }])
            }
            Work::Bags { part, dtype, mode, places, rows, columns, positions, bags, padding } => {
                let mut args = places.iter().fold(Args::new(), |args, &at| args.value(at));
                let mut numbers = vec![*rows, *columns, *positions];
                let (entry, warps) = match part {
                    BagsPart::Forward => {
                        numbers.push(*bags);
                        ("forward", *bags)
                    }
                    BagsPart::Table => ("table_gradient", *positions),
                    BagsPart::Weights => ("weight_gradient", *positions),
                };
                numbers.push(*padding);
                args = numbers.into_iter().fold(args, |args, n| args.value(n));
                let mode = ("TW_MODE", *mode as u64);
                let set = [element(*dtype)?, mode, ("TW_SHORT", 1), none];
                Ok(vec![Launch {
                    kernel: Kernel { text: Text::Bags, entry, set },
                    blocks: warps.cast_unsigned().div_ceil(bags::WARPS),
                    threads: 32 * bags::WARPS as u32,
                    args,
                }])
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
            Work::Bags { dtype, .. } => with_number!(*dtype, bagged(self, threads)),
        }
    }
}

/// Whole numbers at an address.
fn whole(address: u64, elements: i64) -> Vec<i64> {
    if address == 0 || elements <= 0 {
        return Vec::new();
    }
    // SAFETY: `Work::on_host`'s contract.
    let all = unsafe { std::slice::from_raw_parts(address as *const i32, elements as usize) };
    all.iter().map(|&n| n.into()).collect()
}

/// Puts whole numbers, which `Work::check` has seen to be short, at an address.
fn put(numbers: &[i64], address: u64) {
    if address == 0 || numbers.is_empty() {
        return;
    }
    // SAFETY: as for `write`.
    let all = unsafe { std::slice::from_raw_parts_mut(address as *mut i32, numbers.len()) };
    for (to, from) in all.iter_mut().zip(numbers) {
        *to = *from as i32;
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

fn bagged<T: Number>(work: &Work, threads: usize) -> Result<()> {
    let Work::Bags { part, mode, places, rows, columns, positions, bags, padding, .. } = work
    else {
        return Err(Error::bug("no bags"));
    };
    let (mode, rows, positions, bags, padding) = (*mode, *rows, *positions, *bags, *padding);
    let (width, maxima) = (*columns, if mode == Mode::Max { bags * *columns } else { 0 });
    let columns = width as usize;
    match (part, &places[..]) {
        (BagsPart::Forward, &[table, indices, offsets, weights, y, bag_of, count, place]) => {
            let (indices, offsets) = (whole(indices, positions), whole(offsets, bags));
            let all = bags::Bags {
                table: read::<T>(table, rows * width),
                weights: (weights != 0).then(|| read::<T>(weights, positions)),
                indices: &indices,
                offsets: &offsets,
                rows,
                columns,
                mode,
                padding,
            };
            let mut lists = [positions, bags, maxima].map(|n| vec![0_i64; n.max(0) as usize]);
            all.forward(
                threads,
                write::<T>(y, bags * width),
                lists.each_mut().map(|l| &mut l[..]),
            )?;
            for (list, at) in lists.iter().zip([bag_of, count, place]) {
                put(list, at);
            }
            Ok(())
        }
        (BagsPart::Table, &[dy, sorted, position, weights, bag_of, count, place, gradient]) => {
            let of = bags::GradientOf {
                dy: read::<T>(dy, bags * width),
                weights: (weights != 0).then(|| read::<T>(weights, positions)),
                sorted: &whole(sorted, positions),
                position: &whole(position, positions),
                bag_of: &whole(bag_of, positions),
                count: &whole(count, bags),
                place: &whole(place, maxima),
                sizes: [rows, bags],
                columns,
                mode,
                padding,
            };
            if columns == 0 {
                return Ok(());
            }
            of.table(threads, write::<T>(gradient, rows * width))
        }
        (BagsPart::Weights, &[dy, table, indices, bag_of, gradient]) => {
            let floats = [read::<T>(dy, bags * width), read::<T>(table, rows * width)];
            let lists = [&whole(indices, positions)[..], &whole(bag_of, positions)];
            let gradient = write::<T>(gradient, positions);
            bags::weights_on_slices(floats, lists, gradient, columns, [rows, bags, padding]);
            Ok(())
        }
        _ => Err(Error::bug("places of bags")),
    }
}
