//! [`Written`]: launches of a step whose text is written by hand, which devices take instead of the plan's.
//!
//! Each computes what one or two [`super::DecodeStep`]s compute. Plans keep those: other devices launch them, the device interpreter
//! runs them.

use tilewright_base::{Error, Result};
use tilewright_cuda::{Arch, Args, CompileRequest, Function, LaunchShape, PreparedLaunch};
use tilewright_launch::Loader;

/// What a launch passes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Argument {
    /// The address of a region.
    Region(usize),
    /// A 64-bit integer.
    Count(i64),
    /// A 32-bit float.
    Factor(f32),
}

/// A launch whose text is written by hand.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Name of the kernel.
    pub(super) name: &'static str,
    pub(super) text: &'static str,
    /// Numbers, by their names in the text.
    pub(super) definitions: Vec<(&'static str, String)>,
    pub(super) blocks: u32,
    pub(super) threads: u32,
    pub(super) cluster: u32,
    pub(super) arguments: Vec<Argument>,
    /// How many steps of the plan it stands in for.
    pub(super) stands_for: usize,
    /// For people.
    pub(super) schedule: String,
}

impl Written {
    /// What the compiler is asked for.
    pub fn request(&self, arch: Arch) -> CompileRequest {
        let request = CompileRequest::new(self.name, self.text, arch).option("-std=c++17");
        self.definitions
            .iter()
            .fold(request, |request, (name, value)| request.option(format!("-D{name}={value}")))
    }

    /// Name of the kernel.
    pub fn entry(&self) -> &'static str {
        self.name
    }

    /// The kernel.
    ///
    /// # Errors
    /// The compiler's and the driver's.
    pub(super) fn function(&self, loader: &Loader) -> Result<Function> {
        let compiled = loader.nvrtc().compile(&self.request(loader.target()))?;
        loader.gpu().load(&compiled)?.function(self.name)
    }

    /// Whether two launches are of one kernel.
    pub(super) fn same_kernel(&self, other: &Written) -> bool {
        self.name == other.name && self.definitions == other.definitions
    }

    /// The launch, on a device where region `r` is at `address(r)`.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn prepare(
        &self,
        function: &Function,
        address: &dyn Fn(usize) -> u64,
    ) -> Result<PreparedLaunch> {
        let args = self.arguments.iter().fold(Args::new(), |args, a| match *a {
            Argument::Region(region) => args.value(address(region)),
            Argument::Count(n) => args.value(n),
            Argument::Factor(f) => args.value(f),
        });
        let shape = LaunchShape {
            grid: [self.blocks, 1, 1],
            block: [self.threads, 1, 1],
            cluster: [self.cluster, 1, 1],
            programmatic: true,
            ..LaunchShape::default()
        };
        function.prepare(&shape, &args)
    }
}

/// A number as definitions have it.
pub(super) fn number(n: i64) -> String {
    n.to_string()
}

/// A launch of so many blocks of so many threads.
pub(super) fn counts(blocks: i64, threads: i64) -> Result<(u32, u32)> {
    match (u32::try_from(blocks), u32::try_from(threads)) {
        (Ok(blocks), Ok(threads)) => Ok((blocks, threads)),
        _ => Err(Error::unsupported(format!("{blocks} blocks of {threads} threads"))),
    }
}
