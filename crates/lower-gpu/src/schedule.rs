//! [`GpuSchedule`]: how a tile program is run on a GPU, apart from what it computes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use tilewright_device::{Arch, CachePolicy, Streams};

/// How consumer warpgroups share work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// All consumers work on one tile, each on its rows.
    Cooperative,
    /// Two consumers take turns: each has a whole tile, one multiplies while the other stores.
    PingPong,
}

/// Which instructions multiply. The first overlaps copies and products by giving them to different
/// warps, the others by starting the copies of later steps before the products of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProductKind {
    /// `wgmma`, fed by the copy engine: Hopper.
    Wgmma,
    /// `mma.sync`, fed by plain asynchronous copies: from Ampere on, any alignment and layout.
    MmaSync,
    /// The same for f32 operands in two TF32 parts each: three products for one, and sums about as exact as those of
    /// multiply-adds. Infinities become NaN.
    MmaSplit,
    /// Plain multiply-adds: f32 sums of f32 products, nothing rounded on the way in.
    Fma,
}

/// How results reach global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StoreKind {
    /// Through shared memory and the copy engine; the address and the strides of the tensor must be
    /// multiples of 16 bytes.
    Tma,
    /// From registers.
    Direct,
    /// Through shared memory, so that neighbouring threads write neighbouring addresses.
    Staged,
}

/// How threads share a tile of a program without products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinesKnobs {
    /// Threads per block: a power of two from 32 to 1024.
    pub threads: u32,
    /// Neighbouring threads that share a row: a power of two.
    pub lanes: u32,
    /// Neighbouring columns per thread.
    pub vector: u32,
    /// Loads start before the reductions above them.
    pub early: bool,
    /// For kernels that are launched early: the next one may start with this one, not with its end, and matrices that the
    /// first loop reads are weights, which no kernel writes: their lines are asked for while the kernel before still runs.
    pub ahead: bool,
    /// Pieces that loops of one block share and keep in shared memory; 0: each loop reads them.
    pub kept: u32,
    /// Turns of a loop whose loads are under way at a time; below 2: each turn loads for itself.
    pub fetched: u32,
    /// How streams go through the caches.
    pub streams: Streams,
    /// Lines begin and end within accesses of `vector` elements, and tiles begin where accesses are aligned in memory: see
    /// `run` in `line_ops.rs`. Sizes are numbers then.
    pub ragged: bool,
}

impl Default for LinesKnobs {
    fn default() -> LinesKnobs {
        LinesKnobs {
            threads: 256,
            lanes: 256,
            vector: 1,
            early: true,
            ahead: false,
            kept: 0,
            fetched: 0,
            streams: Streams::Cached,
            ragged: false,
        }
    }
}

/// The knobs of one kernel on a GPU. Any legal schedule gives the same result up to the order of
/// floating-point sums.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpuSchedule {
    /// For which architecture.
    pub arch: Arch,
    /// A value for each of the kernel's tile sizes.
    pub tiles: BTreeMap<Arc<str>, i64>,
    /// Sizes that the kernel is compiled for, as numbers: it takes no others. Only programs without products have some.
    pub sizes: BTreeMap<Arc<str>, i64>,
    /// Which instructions multiply.
    pub product: ProductKind,
    /// Warps along the rows and the columns of a tile, for `MmaSync` and `Fma`.
    pub warps: (u32, u32),
    /// How consumers share work.
    pub mode: Mode,
    /// Consumer warpgroups.
    pub consumers: u32,
    /// Stages of the ring of operand tiles.
    pub stages: u32,
    /// Blocks per cluster: 1, 2, 4 or 8.
    pub cluster: u32,
    /// Clusters run along this axis of the pair that the raster walks: 0 (rows) or 1 (columns). 2: along both, two rows
    /// of tiles by half as many columns as there are blocks.
    pub cluster_axis: usize,
    /// Rows of clusters that are walked together, column by column, so that their operands stay in
    /// the cache.
    pub raster: u32,
    /// Clusters loop over items of work.
    pub persistent: bool,
    /// How results leave.
    pub store: StoreKind,
    /// Staging tiles per consumer for results.
    pub store_slots: u32,
    /// Elements that one plain access to global memory may take along the contiguous axis.
    pub vector: u32,
    /// The same for copies of operands without the copy engine, whose tensors may be aligned better than the others; 0:
    /// as `vector`.
    pub copies: u32,
    /// Consumers take turns at starting their products, so that one's elementwise steps run beside the
    /// other's products. For products that feed each other.
    pub turns: bool,
    /// A persistent grid walks every second round of items backwards: costs that repeat with the items (long
    /// and short rows of one head) then add up to about the same on every processor.
    pub serpentine: bool,
    /// Launched early, beside the tail of the kernel before it.
    pub dependent: bool,
    /// Blocks that share a multiprocessor.
    pub blocks_per_sm: u32,
    /// What the second-level cache does with the left and the right operand of a product by the copy engine.
    pub cache: [CachePolicy; 2],
    /// Programs without products.
    pub lines: LinesKnobs,
}

impl GpuSchedule {
    /// A plain Hopper schedule for these tile sizes: one consumer per 64 rows up to two, no cluster.
    pub fn hopper(tiles: &[(&str, i64)]) -> GpuSchedule {
        GpuSchedule {
            arch: Arch::Sm90a,
            tiles: tiles.iter().map(|(name, size)| (Arc::from(*name), *size)).collect(),
            sizes: BTreeMap::new(),
            product: ProductKind::Wgmma,
            warps: (4, 1),
            mode: Mode::Cooperative,
            consumers: 2,
            stages: 4,
            cluster: 1,
            cluster_axis: 0,
            raster: 8,
            persistent: true,
            store: StoreKind::Tma,
            store_slots: 2,
            vector: 1,
            copies: 0,
            turns: false,
            serpentine: false,
            dependent: false,
            blocks_per_sm: 1,
            cache: [CachePolicy::Normal; 2],
            lines: LinesKnobs::default(),
        }
    }

    /// Tiles that a cluster covers: rows and columns of them.
    pub fn cluster_tiles(&self) -> (u32, u32) {
        match self.cluster_axis {
            0 => (self.cluster, 1),
            1 => (1, self.cluster),
            _ if self.cluster < 2 => (1, 1),
            _ => (2, self.cluster / 2),
        }
    }

    /// A schedule without a copy engine: all warps copy, then multiply. 3 stages, results straight
    /// from registers.
    pub fn pipelined(
        arch: Arch,
        product: ProductKind,
        warps: (u32, u32),
        tiles: &[(&str, i64)],
    ) -> GpuSchedule {
        GpuSchedule {
            arch,
            product,
            warps,
            stages: 3,
            persistent: false,
            store: StoreKind::Direct,
            store_slots: 1,
            ..GpuSchedule::hopper(tiles)
        }
    }
}

impl GpuSchedule {
    /// The same for a kernel behind others of one stream: it starts beside the tail of the one before and waits for its end, where
    /// the architecture has such launches.
    pub fn behind_others(mut self) -> GpuSchedule {
        self.dependent = self.arch >= Arch::Sm90a;
        self
    }

    /// Whether the kernel starts while the one before still runs, and may ask for its weights then.
    pub(crate) fn reads_ahead(&self) -> bool {
        self.dependent && self.arch >= Arch::Sm90a && self.lines.ahead && !self.persistent
    }

    /// What of a schedule a program without products reads, in a line.
    pub fn lines_text(&self) -> String {
        let all = self.tiles.iter().chain(&self.sizes);
        let tiles: Vec<String> = all.map(|(name, v)| format!("{name}={v}")).collect();
        let LinesKnobs { threads, lanes, vector, early, ahead, kept, fetched, streams, ragged } =
            self.lines;
        format!(
            "{} lines={lanes}/{threads}x{vector} cluster={} blocks={}{}{}{}{}{}{}",
            tiles.join(" "),
            self.cluster,
            self.blocks_per_sm,
            if early { " early" } else { "" },
            if ahead { " ahead" } else { "" },
            if kept > 0 { format!(" kept={kept}") } else { String::new() },
            if fetched > 1 { format!(" fetched={fetched}") } else { String::new() },
            streams_text(streams),
            if ragged { " ragged" } else { "" },
        )
    }
}

fn streams_text(streams: Streams) -> &'static str {
    match streams {
        Streams::Cached => "",
        Streams::Past => " streams",
        Streams::Last => " streams=last",
    }
}

impl fmt::Display for GpuSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, size) in self.tiles.iter().chain(&self.sizes) {
            write!(f, "{name}={size} ")?;
        }
        let LinesKnobs { threads, lanes, vector, early, ahead, kept, fetched, streams, ragged } =
            self.lines;
        let mode = match self.mode {
            Mode::Cooperative => "cooperative",
            Mode::PingPong => "ping-pong",
        };
        let (wm, wn) = self.warps;
        let who = match self.product {
            ProductKind::Wgmma => format!("wgmma {mode} consumers={}", self.consumers),
            ProductKind::MmaSync => format!("mma.sync warps={wm}x{wn}"),
            ProductKind::MmaSplit => format!("mma.sync-x3 warps={wm}x{wn}"),
            ProductKind::Fma => format!("fma warps={wm}x{wn}"),
        };
        let store = match self.store {
            StoreKind::Tma => "tma",
            StoreKind::Direct => "direct",
            StoreKind::Staged => "staged",
        };
        let sign = |policy: CachePolicy| match policy {
            CachePolicy::Normal => '=',
            CachePolicy::EvictFirst => '-',
            CachePolicy::EvictLast => '+',
        };
        let kept_in_cache = match self.cache.map(sign) {
            ['=', '='] => String::new(),
            [left, right] => format!(" cache={left}{right}"),
        };
        write!(
            f,
            "{who} stages={} cluster={}@{} raster={} {} store={store}x{} vector={}{} blocks={}{kept_in_cache} lines={lanes}/{threads}x{vector}{}{}{}{}{}{}{}{}{}",
            self.stages,
            self.cluster,
            self.cluster_axis,
            self.raster,
            if self.persistent { "persistent" } else { "one-shot" },
            self.store_slots,
            self.vector,
            if self.copies > 0 { format!(" copies={}", self.copies) } else { String::new() },
            self.blocks_per_sm,
            if early { " early" } else { "" },
            if kept > 0 { format!(" kept={kept}") } else { String::new() },
            if fetched > 1 { format!(" fetched={fetched}") } else { String::new() },
            streams_text(streams),
            if ragged { " ragged" } else { "" },
            if self.turns { " turns" } else { "" },
            if self.serpentine { " serpentine" } else { "" },
            if self.dependent { " dependent" } else { "" },
            if ahead { " ahead" } else { "" },
        )
    }
}
