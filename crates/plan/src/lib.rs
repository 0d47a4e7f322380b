//! A [`Plan`]: kernels in order over buffers, with symbolic sizes.
//!
//! This is what lowering produces and what the runtime runs. It holds tile programs with their
//! schedules, not machine code; the crate `jit` turns each distinct kernel into code once.
//! It knows no frontends and no devices.
//!
//! Where a kernel can also be written in another form ([`Form`]), it says so beside the tile program: a
//! matrix product with its sizes ([`Product`]) or an [`Attention`], which a library of schedules may serve; a program that
//! holds whole rows. A target takes the first form that it has a way to run; the tile program is always
//! there, and says what is computed.
//!
//! What every runtime does with a plan before it runs is here, too: sizes from the inputs
//! ([`bind`]), and places in one block of memory ([`arena`]).

pub mod arena;
mod attention;
pub mod bind;
mod decoder;
mod library;
mod product;

pub use attention::{Attention, Heads};
pub use decoder::{Decoder, DecoderLayer, DecoderNorm};
pub use library::{AttentionBackward, LayerNormBackward, Library};
pub use product::{
    Depth, LeftSums, Matrix, PART_COLUMNS, Product, Prologue, Repeat, RowSums, Second, Vector,
    Windows,
};

use std::sync::Arc;
use tilewright_base::{DType, IdVec, typed_id};
use tilewright_data::Tensor;
use tilewright_layout::{Dim, Env, Layout, Symbols};
use tilewright_tile::{Kernel, Schedule};

typed_id!(
    /// A buffer of a plan.
    BufferId,
    "b"
);
typed_id!(
    /// A distinct kernel of a plan.
    KernelId,
    "k"
);

/// Where a buffer's memory comes from.
#[derive(Clone, Debug)]
pub enum Storage {
    /// Input number `i` of the model, row-major, given by the caller.
    Input(usize),
    /// Output number `i` of the model, row-major, given by the caller.
    Output(usize),
    /// Known data in row-major order. With a layout other than row-major the runtime packs it once,
    /// when the plan is loaded, and rounds it to the buffer's element type when that is another.
    Const(Tensor),
    /// Part of the arena; lives from its first writer to its last reader.
    Arena,
    /// State number `i` of the plan: memory that is kept from run to run.
    State(usize),
}

/// A tensor in memory.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// Where it comes from, for people: value name of the graph.
    pub name: String,
    /// Number of the graph value that it holds, so that its contents can be checked against the
    /// oracle; `None` for what no graph value corresponds to.
    pub value: Option<u32>,
    /// Element type.
    pub dtype: DType,
    /// Shape and placement of elements. Memory is `layout.alloc_elements()` elements; elements of
    /// whole blocks beyond the shape hold zero in constants and anything elsewhere.
    pub layout: Layout,
    /// Where the memory is.
    pub storage: Storage,
}

/// A kernel with how to run it. Two steps that do the same thing share one.
#[derive(Clone, Debug)]
pub struct PlanKernel {
    /// What a block computes.
    pub kernel: Arc<Kernel>,
    /// How, on a CPU; the interpreter takes its tile sizes.
    pub schedule: Schedule,
    /// Other forms of the same computation, the preferred one first. For GPUs.
    pub forms: Vec<Form>,
}

/// Another form of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Another tile program. Its parameter `i` is the kernel's parameter `params[i]`.
    Program {
        /// The program.
        kernel: Arc<Kernel>,
        /// Which parameters of the step's kernel are its own.
        params: Vec<usize>,
    },
    /// A matrix product. Parameters are the kernel's.
    Product(Box<Product>),
    /// Attention. Parameters are the kernel's.
    Attention(Box<Attention>),
}

/// One step of a plan.
#[derive(Clone, Debug)]
pub enum Step {
    /// Runs a kernel over its grid.
    Launch {
        /// Which.
        kernel: KernelId,
        /// A buffer for each parameter of the kernel.
        args: Vec<BufferId>,
        /// A value for each of the kernel's symbols, over the plan's symbols.
        sizes: Vec<Dim>,
        /// What it stands for.
        note: Note,
    },
    /// Runs kernels of a library, on a GPU.
    Library {
        /// What they compute.
        call: Box<Library>,
        /// Operands.
        inputs: Vec<BufferId>,
        /// Results.
        outputs: Vec<BufferId>,
        /// What it stands for.
        note: Note,
    },
    /// Runs an operator of the interpreter on the host: correct, slow. Buffers are row-major.
    Host {
        /// The operator.
        op: HostCall,
        /// Operands.
        inputs: Vec<BufferId>,
        /// Results.
        outputs: Vec<BufferId>,
        /// What it stands for.
        note: Note,
    },
}

impl Step {
    /// What the step stands for.
    pub fn note(&self) -> &Note {
        match self {
            Step::Launch { note, .. } | Step::Library { note, .. } | Step::Host { note, .. } => {
                note
            }
        }
    }
}

/// A function from concrete operands, and the sizes known so far, to concrete results.
pub type HostFn = dyn Fn(&[Tensor], &Env) -> tilewright_base::Result<Vec<Tensor>> + Send + Sync;

/// What a host step calls: an opaque graph operator, run by whoever made the plan.
#[derive(Clone)]
pub struct HostCall {
    /// Name for people.
    pub name: String,
    /// The operator. The sizes are there for attributes that no operand's shape tells, such as the
    /// `k` of a TopK.
    pub run: Arc<HostFn>,
}

impl std::fmt::Debug for HostCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostCall({})", self.name)
    }
}

/// What a step does, for `explain`: costs are expressions over the plan's symbols.
#[derive(Clone, Debug, Default)]
pub struct Note {
    /// Short label: `contract+bias+gelu`.
    pub label: String,
    /// Kind of the anchor: `contract`, `conv`, `attention`, `rows`, `map`, `host`.
    pub anchor: String,
    /// Graph nodes fused here, by their origin names.
    pub nodes: Vec<String>,
    /// Floating-point operations.
    pub flops: Dim,
    /// Bytes that must be read and written at least once.
    pub bytes: Dim,
    /// Bytes of intermediates that fusion keeps out of memory (written and read once each).
    pub bytes_saved: Dim,
    /// Time that the fusion planner estimated, in nanoseconds at the smallest sizes of the ranges.
    pub estimate_ns: f64,
}

/// A change of shape that is one for some sizes only, such as rows of three made of `N` elements.
#[derive(Clone, Debug)]
pub struct Reshaped {
    /// Where it came from, for people.
    pub node: String,
    /// The shape that is read.
    pub from: Vec<Dim>,
    /// The shape that it becomes.
    pub to: Vec<Dim>,
}

/// Memory that a session keeps from run to run, and that each run makes longer: a run reads what earlier runs wrote in
/// front, and writes what it adds behind. It is no input and no output.
#[derive(Clone, Debug)]
pub struct State {
    /// Name of the model's output that it stands for.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// What there is memory for, row-major.
    pub shape: Vec<Dim>,
    /// What is valid after a run; at most `shape`.
    pub valid: Vec<Dim>,
}

/// Ordered kernels over buffers.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Name of the model.
    pub name: String,
    /// Symbols of the model's sizes.
    pub symbols: Symbols,
    /// All buffers.
    pub buffers: IdVec<BufferId, Buffer>,
    /// Distinct kernels.
    pub kernels: IdVec<KernelId, PlanKernel>,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// Shapes that must hold equally many elements, and are not known to.
    pub reshapes: Vec<Reshaped>,
    /// Names of the inputs, in order, with element type and shape.
    pub inputs: Vec<(String, DType, Vec<Dim>)>,
    /// Names of the outputs, in order, with element type and shape.
    pub outputs: Vec<(String, DType, Vec<Dim>)>,
    /// Memory that is kept from run to run.
    pub states: Vec<State>,
}
