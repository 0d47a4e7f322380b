//! Tile IR: the program of one block of a grid.
//!
//! A [`Kernel`] says what one block computes: it loads tiles of global tensors, combines them and
//! stores tiles. Values are tiles (element type and static shape) with value semantics; indices are
//! integer expressions. There are no threads, no memory spaces and no barriers here: how a block
//! runs is said by a [`Schedule`] and decided by the target's lowering.
//!
//! ```text
//! kernel @linear_gelu(%A: bf16[M,K], %B: bf16[K,N], %bias: bf16[N], out %C: bf16[M,N])
//!     tile(BM, BN, BK) grid(pm in ceil(M/BM), pn in ceil(N/BN)) {
//!   %zero = full 0 : f32[BM,BN]
//!   %acc = for k in 0..ceil(K/BK) carry(%c = %zero) {
//!     %a = load %A[pm*BM, k*BK] : bf16[BM,BK]
//!     %b = load %B[k*BK, pn*BN] : bf16[BK,BN]
//!     %d = mma %c, %a, %b limit K - k*BK
//!     yield %d
//!   }
//!   %v = load %bias[pn*BN] : bf16[BN]
//!   %r = map(%acc, %v along 1) { x, b -> bf16(gelu(x + f32(b))) } : bf16[BM,BN]
//!   store %C[pm*BM, pn*BN], %r
//! }
//! ```

mod builder;
mod cursor;
mod in_place;
mod ir;
mod parse;
mod print;
mod rename;
mod schedule;
mod substitute;
mod top_k;
mod verify;

pub use builder::KernelBuilder;
pub use in_place::may_overwrite;
pub use ir::{
    Access, Block, Bound, Compare, For, GridAxis, If, Kernel, Operand, Param, ParamId, ReduceKind,
    Stmt, TileId, TileInfo, TileOp, TileType,
};
pub use rename::Names;
pub use schedule::{CpuKnobs, MatrixUnit, Schedule};
pub use substitute::{substitute, substitute_block};
pub use top_k::TopK;
pub use verify::{verify, verify_schedule};
