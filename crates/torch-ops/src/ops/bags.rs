//! Bags of rows of a table (`torch.nn.EmbeddingBag`): their sums, means or maxima, and the gradients.
//!
//! Positions `offsets[b]` to `offsets[b + 1] - 1` of `indices` are bag `b`. Rows that are `padding` do not count. The gradient of the
//! table is dense and summed in the order of the positions: the caller sorts them by row first. On a GPU a row outside of the table makes
//! its bag NaN (kernels raise no errors); on the processor it is refused.

use crate::host::{self, Float, Number, with_number};
use crate::tensors::{float, plain, same_device};
use crate::written::{Set, Text, element, launch};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::Args;
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// What becomes of the rows of a bag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
    /// Their maxima.
    Max,
}

impl Mode {
    /// By its number.
    ///
    /// # Errors
    /// The user's for a number that is none.
    pub fn of(number: i64) -> Result<Mode> {
        match number {
            0 => Ok(Mode::Sum),
            1 => Ok(Mode::Mean),
            2 => Ok(Mode::Max),
            _ => Err(Error::user(format!("mode {number} is none of 0 (sum), 1 (mean), 2 (max)"))),
        }
    }
}

/// A dense list of whole numbers on the device of `first`.
fn whole(name: &str, tensor: Tensor, first: &Tensor) -> Result<Tensor> {
    same_device(name, &tensor, first)?;
    if tensor.sizes().len() != 1 || tensor.dtype()? != DType::I64 {
        let message = format!(
            "{name} is {} of shape {:?}; it must be int64 of one axis",
            tensor.dtype()?,
            tensor.sizes()
        );
        return Err(Error::user(message));
    }
    tensor.laid_out(1)
}

fn weights_of(weights: Option<Tensor>, positions: i64, table: &Tensor) -> Result<Option<Tensor>> {
    let Some(w) = weights else { return Ok(None) };
    same_device("per_sample_weights", &w, table)?;
    if w.sizes() != [positions] || w.dtype()? != table.dtype()? {
        let message = format!(
            "per_sample_weights is {} of shape {:?}; it must be {} of shape [{positions}]",
            w.dtype()?,
            w.sizes(),
            table.dtype()?
        );
        return Err(Error::user(message));
    }
    plain(w).map(Some)
}

/// Warps of a block of `bags.cu`.
pub(crate) const WARPS: u64 = 8;

fn on_gpu(
    abi: &'static Abi,
    index: u32,
    entry: &'static str,
    (dtype, mode): (DType, Mode),
    warps: i64,
    args: &Args,
) -> Result<()> {
    let none = ("", 0);
    let set: Set = [element(dtype)?, ("TW_MODE", mode as u64), none, none];
    let blocks = warps.cast_unsigned().div_ceil(WARPS);
    launch(abi, index, (Text::Bags, entry, &set), blocks, 32 * WARPS as u32, args)
}

fn at(tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), Tensor::address)
}

/// The bags; for the gradients (`LISTS`) also which bag each position is in, how many rows each bag counts, and where each maximum came from.
pub(crate) struct EmbeddingBag<const LISTS: bool>;

impl<const LISTS: bool> Operator for EmbeddingBag<LISTS> {
    const NAME: &'static str = if LISTS { "embedding_bag" } else { "embedding_bag.inference" };
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("weight", Arg::Tensor),
        ("indices", Arg::Tensor),
        ("offsets", Arg::Tensor),
        ("per_sample_weights", Arg::Optional),
        ("mode", Arg::Int),
        ("padding_idx", Arg::Int),
    ];
    const RETURNS: &'static str =
        if LISTS { "(Tensor y, Tensor bag_of, Tensor count, Tensor place)" } else { "Tensor" };
    const OVERLOADS: &'static [&'static str] = if LISTS { &["raw"] } else { &[] };

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [table, indices, offsets, weights, mode, padding] = args else {
            return Err(Error::bug("arguments"));
        };
        let (table, mode, padding) = (table.tensor()?, Mode::of(mode.int()?)?, padding.int()?);
        let dtype = float("weight", &table)?;
        let &[rows, columns] = table.sizes() else {
            return Err(Error::user(format!("weight has shape {:?}", table.sizes()))
                .with_hint("it has two axes: rows and what is in each"));
        };
        let indices = whole("indices", indices.tensor()?, &table)?;
        let offsets = whole("offsets", offsets.tensor()?, &table)?;
        let (positions, bags) = (indices.elements(), offsets.elements());
        let weights = weights_of(weights.optional()?, positions, &table)?;
        if weights.is_some() && mode != Mode::Sum {
            return Err(Error::user("per_sample_weights are for sums only"));
        }
        let table = plain(table)?;
        let y = Tensor::empty(abi, &[bags, columns], dtype, table.device())?;
        let lists = if LISTS {
            let list = |n: i64| Tensor::empty(abi, &[n], DType::I64, table.device());
            let places = if mode == Mode::Max { bags * columns } else { 0 };
            let lists = [list(positions)?, list(bags)?, list(places)?];
            if bags == 0 {
                // No bag writes that a position is in it.
                lists[0].zero()?;
            }
            Some(lists)
        } else {
            None
        };
        if let Device::Cuda(index) = table.device() {
            let mut args = Args::new();
            let tensors = [&table, &indices, &offsets];
            for tensor in tensors {
                args = args.value(tensor.address()?);
            }
            args = args.value(at(weights.as_ref())?).value(y.address()?);
            for list in 0..3 {
                args = args.value(at(lists.as_ref().map(|lists| &lists[list]))?);
            }
            for number in [rows, columns, positions, bags, padding] {
                args = args.value(number);
            }
            if bags > 0 {
                on_gpu(abi, index, "forward", (dtype, mode), bags, &args)?;
            }
        } else {
            let inputs = [Some(&table), weights.as_ref()];
            let whole = [&indices, &offsets];
            with_number!(
                dtype,
                bags_on_host(abi, inputs, whole, &y, lists.as_ref(), mode, padding)
            )?;
        }
        Ok([y].into_iter().chain(lists.into_iter().flatten()).map(Value::Tensor).collect())
    }
}

fn bags_on_host<T: Number>(
    abi: &'static Abi,
    [table, weights]: [Option<&Tensor>; 2],
    [indices, offsets]: [&Tensor; 2],
    y: &Tensor,
    lists: Option<&[Tensor; 3]>,
    mode: Mode,
    padding: i64,
) -> Result<()> {
    let Some(table) = table else { return Err(Error::bug("no table")) };
    let &[rows, columns] = table.sizes() else { return Err(Error::bug("no matrix")) };
    let (table, columns) = (host::read::<T>(table)?, columns as usize);
    let weights = weights.map(|w| host::read::<T>(w)).transpose()?;
    let (indices, offsets) = (host::read_whole(indices)?, host::read_whole(offsets)?);
    let bags = Bags { table, weights, indices, offsets, rows, columns, mode, padding };
    let y = host::write::<T>(y)?;
    if let Some([bag_of, count, place]) = lists {
        let lists = [bag_of, count, place].map(host::write_whole);
        let [bag_of, count, place] = lists;
        return bags.forward(abi.threads(), y, [bag_of?, count?, place?]);
    }
    let places = if mode == Mode::Max { y.len() } else { 0 };
    let mut lists = [indices.len(), offsets.len(), places].map(|long| vec![0; long]);
    let [bag_of, count, place] = &mut lists;
    bags.forward(abi.threads(), y, [bag_of, count, place])
}

/// Bags whose numbers lie in memory.
pub(crate) struct Bags<'a, T> {
    pub(crate) table: &'a [T],
    pub(crate) weights: Option<&'a [T]>,
    pub(crate) indices: &'a [i64],
    pub(crate) offsets: &'a [i64],
    pub(crate) rows: i64,
    pub(crate) columns: usize,
    pub(crate) mode: Mode,
    pub(crate) padding: i64,
}

impl<T: Number> Bags<'_, T> {
    /// The bags; and which bag each position is in, how many rows each bag counts, where each maximum came from.
    pub(crate) fn forward(
        &self,
        threads: usize,
        y: &mut [T],
        [bag_of, count, place]: [&mut [i64]; 3],
    ) -> Result<()> {
        let Bags { table, weights, indices, offsets, rows, columns, mode, padding } = *self;
        let outside = |row: &&i64| **row != padding && !(0..rows).contains(*row);
        if let Some(row) = indices.iter().find(outside) {
            return Err(Error::user(format!("index {row} is outside of a table of {rows} rows")));
        }
        let last = indices.len() as i64;
        let ends: Vec<i64> = offsets.iter().skip(1).copied().chain([last]).collect();
        let good = offsets.first().is_none_or(|first| *first == 0)
            && offsets.iter().zip(&ends).all(|(begin, end)| begin <= end && *end <= last);
        if !good {
            let message = format!("offsets must begin with 0, not fall, and end within {last}");
            return Err(Error::user(message));
        }
        let mut outputs = y.chunks_mut(columns.max(1));
        let mut places = place.chunks_mut(columns.max(1));
        let mut jobs = Vec::new();
        for (bag, (begin, end)) in offsets.iter().zip(&ends).enumerate() {
            let positions = *begin as usize..*end as usize;
            bag_of[positions.clone()].fill(bag as i64);
            let kept = indices[positions.clone()].iter().filter(|row| **row != padding).count();
            count[bag] = kept as i64;
            let output = outputs.next().unwrap_or_default();
            jobs.push((positions, kept, output, places.next().unwrap_or_default()));
        }
        let work = |(positions, kept, output, place): (
            std::ops::Range<usize>,
            usize,
            &mut [T],
            &mut [i64],
        )| {
            let mut sums = vec![T::Wide::of(0.0); columns];
            place.fill(-1);
            for p in positions {
                let row = indices[p];
                if row == padding {
                    continue;
                }
                let values = &table[row as usize * columns..][..columns];
                let weight = weights.map_or(T::Wide::of(1.0), |w| w[p].wide());
                if mode == Mode::Max {
                    for ((sum, value), place) in sums.iter_mut().zip(values).zip(&mut *place) {
                        let value = value.wide();
                        // A NaN wins, as in PyTorch.
                        if *place < 0 || value > *sum || value.double().is_nan() {
                            (*sum, *place) = (value, p as i64);
                        }
                    }
                } else {
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = *sum + value.wide() * weight;
                    }
                }
            }
            let scale = match mode {
                Mode::Mean if kept > 0 => T::Wide::of(1.0) / T::Wide::of(kept as f64),
                _ => T::Wide::of(1.0),
            };
            for (y, sum) in output.iter_mut().zip(sums) {
                *y = T::narrow(sum * scale);
            }
        };
        host::in_parallel(threads, indices.len() * columns, jobs, work);
        Ok(())
    }
}

/// The gradient of the table: `sorted` are the indices in order, `position` where each of them was.
pub(crate) struct EmbeddingBagBackward;

impl Operator for EmbeddingBagBackward {
    const NAME: &'static str = "embedding_bag_backward";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dy", Arg::Tensor),
        ("sorted", Arg::Tensor),
        ("position", Arg::Tensor),
        ("per_sample_weights", Arg::Optional),
        ("bag_of", Arg::Tensor),
        ("count", Arg::Tensor),
        ("place", Arg::Tensor),
        ("rows", Arg::Int),
        ("mode", Arg::Int),
        ("padding_idx", Arg::Int),
    ];
    const RETURNS: &'static str = "Tensor";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, sorted, position, weights, bag_of, count, place, rows, mode, padding] = args
        else {
            return Err(Error::bug("arguments"));
        };
        let (dy, rows, mode) = (dy.tensor()?, rows.int()?, Mode::of(mode.int()?)?);
        let (dtype, padding) = (float("dy", &dy)?, padding.int()?);
        let &[bags, columns] = dy.sizes() else {
            return Err(Error::user(format!("dy has shape {:?}", dy.sizes())));
        };
        let sorted = whole("sorted", sorted.tensor()?, &dy)?;
        let positions = sorted.elements();
        let lists =
            [("position", position), ("bag_of", bag_of), ("count", count), ("place", place)];
        let mut kept = Vec::new();
        for (name, list) in lists {
            let list = whole(name, list.tensor()?, &dy)?;
            let long = match name {
                "count" => bags,
                "place" if mode == Mode::Max => bags * columns,
                "place" => 0,
                _ => positions,
            };
            if list.elements() != long {
                return Err(Error::user(format!("{name} is not what the forward pass gave")));
            }
            kept.push(list);
        }
        let weights = weights_of(weights.optional()?, positions, &dy)?;
        let dy = plain(dy)?;
        let gradient = Tensor::empty(abi, &[rows, columns], dtype, dy.device())?;
        gradient.zero()?;
        let [position, bag_of, count, place] = &kept[..] else {
            return Err(Error::bug("lists"));
        };
        if positions == 0 || columns == 0 {
            return Ok(vec![Value::Tensor(gradient)]);
        }
        if let Device::Cuda(index) = dy.device() {
            let mut args = Args::new();
            for tensor in [&dy, &sorted, position] {
                args = args.value(tensor.address()?);
            }
            args = args.value(at(weights.as_ref())?);
            for tensor in [bag_of, count, place, &gradient] {
                args = args.value(tensor.address()?);
            }
            for number in [rows, columns, positions, padding] {
                args = args.value(number);
            }
            on_gpu(abi, index, "table_gradient", (dtype, mode), positions, &args)?;
        } else {
            let lists = [&sorted, position, bag_of, count, place];
            let w = weights.as_ref();
            with_number!(dtype, table_on_host(abi, &dy, w, lists, &gradient, mode, padding))?;
        }
        Ok(vec![Value::Tensor(gradient)])
    }
}

fn table_on_host<T: Number>(
    abi: &'static Abi,
    dy: &Tensor,
    weights: Option<&Tensor>,
    lists: [&Tensor; 5],
    gradient: &Tensor,
    mode: Mode,
    padding: i64,
) -> Result<()> {
    let [sorted, position, bag_of, count, place] = lists;
    let (&[bags, columns], &[rows, _]) = (dy.sizes(), gradient.sizes()) else {
        return Err(Error::bug("no matrix"));
    };
    let gradient = host::write::<T>(gradient)?;
    let of = GradientOf {
        dy: host::read::<T>(dy)?,
        weights: weights.map(|w| host::read::<T>(w)).transpose()?,
        sorted: host::read_whole(sorted)?,
        position: host::read_whole(position)?,
        bag_of: host::read_whole(bag_of)?,
        count: host::read_whole(count)?,
        place: host::read_whole(place)?,
        sizes: [rows, bags],
        columns: columns as usize,
        mode,
        padding,
    };
    of.table(abi.threads(), gradient)
}

/// What the gradient of a table is made of, in memory. `sizes`: rows of the table, and bags.
pub(crate) struct GradientOf<'a, T> {
    pub(crate) dy: &'a [T],
    pub(crate) weights: Option<&'a [T]>,
    pub(crate) sorted: &'a [i64],
    pub(crate) position: &'a [i64],
    pub(crate) bag_of: &'a [i64],
    pub(crate) count: &'a [i64],
    pub(crate) place: &'a [i64],
    pub(crate) sizes: [i64; 2],
    pub(crate) columns: usize,
    pub(crate) mode: Mode,
    pub(crate) padding: i64,
}

impl<T: Number> GradientOf<'_, T> {
    /// The gradient of the table, which is zero before.
    pub(crate) fn table(&self, threads: usize, gradient: &mut [T]) -> Result<()> {
        let GradientOf { dy, weights, sorted, position, bag_of, count, place, .. } = *self;
        let GradientOf { sizes: [rows, bags], columns, mode, padding, .. } = *self;
        let long = sorted.len() as i64;
        let good = position.iter().all(|p| (0..long).contains(p))
            && bag_of.iter().all(|b| (0..bags).contains(b))
            && sorted.is_sorted();
        if !good {
            return Err(Error::user("positions and bags are not what the forward pass gave"));
        }
        let mut lines = gradient.chunks_mut(columns).enumerate();
        let mut jobs = Vec::new();
        let mut first = 0;
        for run in sorted.chunk_by(|a, b| a == b) {
            let these = first..first + run.len();
            first += run.len();
            let row = run[0];
            if row == padding || !(0..rows).contains(&row) {
                continue;
            }
            // Rows come in order, so each is still ahead.
            let line = lines.by_ref().find(|(number, _)| *number as i64 == row);
            if let Some((_, line)) = line {
                jobs.push((these, line));
            }
        }
        let work = |(these, line): (std::ops::Range<usize>, &mut [T])| {
            let mut sums = vec![T::Wide::of(0.0); columns];
            for &p in &position[these] {
                let bag = bag_of[p as usize] as usize;
                let mut by = weights.map_or(T::Wide::of(1.0), |w| w[p as usize].wide());
                if mode == Mode::Mean {
                    by = by / T::Wide::of(count[bag] as f64);
                }
                let values = &dy[bag * columns..][..columns];
                for (d, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                    if mode != Mode::Max || place[bag * columns + d] == p {
                        *sum = *sum + value.wide() * by;
                    }
                }
            }
            for (y, sum) in line.iter_mut().zip(sums) {
                *y = T::narrow(sum);
            }
        };
        host::in_parallel(threads, sorted.len() * columns, jobs, work);
        Ok(())
    }
}

/// The gradient of the weights of the rows in a sum: the product of each row with the gradient of its bag.
pub(crate) struct EmbeddingBagWeightsBackward;

impl Operator for EmbeddingBagWeightsBackward {
    const NAME: &'static str = "embedding_bag_weights_backward";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dy", Arg::Tensor),
        ("weight", Arg::Tensor),
        ("indices", Arg::Tensor),
        ("bag_of", Arg::Tensor),
        ("padding_idx", Arg::Int),
    ];
    const RETURNS: &'static str = "Tensor";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, table, indices, bag_of, padding] = args else {
            return Err(Error::bug("arguments"));
        };
        let (dy, table, padding) = (dy.tensor()?, table.tensor()?, padding.int()?);
        let dtype = float("dy", &dy)?;
        same_device("weight", &table, &dy)?;
        let (&[bags, columns], &[rows, width]) = (dy.sizes(), table.sizes()) else {
            return Err(Error::user("dy and weight must have two axes"));
        };
        if width != columns || table.dtype()? != dtype {
            return Err(Error::user("dy and weight do not go together"));
        }
        let indices = whole("indices", indices.tensor()?, &dy)?;
        let bag_of = whole("bag_of", bag_of.tensor()?, &dy)?;
        let positions = indices.elements();
        if bag_of.elements() != positions {
            return Err(Error::user("bag_of is not what the forward pass gave"));
        }
        let (dy, table) = (plain(dy)?, plain(table)?);
        let gradient = Tensor::empty(abi, &[positions], dtype, dy.device())?;
        if positions == 0 {
            return Ok(vec![Value::Tensor(gradient)]);
        }
        if let Device::Cuda(index) = dy.device() {
            let mut args = Args::new();
            for tensor in [&dy, &table, &indices, &bag_of, &gradient] {
                args = args.value(tensor.address()?);
            }
            for number in [rows, columns, positions, padding] {
                args = args.value(number);
            }
            on_gpu(abi, index, "weight_gradient", (dtype, Mode::Sum), positions, &args)?;
        } else {
            let lists = [&indices, &bag_of];
            with_number!(dtype, weights_on_host(&dy, &table, lists, &gradient, (bags, padding)))?;
        }
        Ok(vec![Value::Tensor(gradient)])
    }
}

fn weights_on_host<T: Number>(
    dy: &Tensor,
    table: &Tensor,
    [indices, bag_of]: [&Tensor; 2],
    gradient: &Tensor,
    (bags, padding): (i64, i64),
) -> Result<()> {
    let &[rows, columns] = table.sizes() else { return Err(Error::bug("no matrix")) };
    let (dy, table) = (host::read::<T>(dy)?, host::read::<T>(table)?);
    let lists = [host::read_whole(indices)?, host::read_whole(bag_of)?];
    let gradient = host::write::<T>(gradient)?;
    weights_on_slices([dy, table], lists, gradient, columns as usize, [rows, bags, padding]);
    Ok(())
}

/// The gradient of the weights of rows, of numbers in memory.
pub(crate) fn weights_on_slices<T: Number>(
    [dy, table]: [&[T]; 2],
    [indices, bag_of]: [&[i64]; 2],
    gradient: &mut [T],
    columns: usize,
    [rows, bags, padding]: [i64; 3],
) {
    for ((y, &row), &bag) in gradient.iter_mut().zip(indices).zip(bag_of) {
        let mut sum = T::Wide::of(0.0);
        if row != padding && (0..rows).contains(&row) && (0..bags).contains(&bag) {
            let values = &table[row as usize * columns..][..columns];
            for (a, b) in values.iter().zip(&dy[bag as usize * columns..][..columns]) {
                sum = sum + a.wide() * b.wide();
            }
        }
        *y = T::narrow(sum);
    }
}
