//! Running a plan on a GPU.
//!
//! ```text
//! Plan + sizes --bind--> for each kernel the ways to run it, best first (Chooser); memory in one arena
//!      --Session-->      compiled and loaded, recorded as a graph, replayed
//!      --interpret-->    the same device programs in the device interpreter: the test that needs no GPU
//! ```
//!
//! Schedules are picked when the sizes of a run are known: the kernels of a plan are symbolic, so sizes
//! change what is launched and how, not what is computed. What has no way to run on the device (an operator
//! of the interpreter, a program that `lower-gpu` refuses) runs on the host, between two copies: correct,
//! slow, counted, and shown with its reason.
//!
//! | module | holds |
//! |---|---|
//! | `once` | which steps depend on constants alone: they run when the plan is loaded |
//! | `constants` | constants on a device, and what such steps make |
//! | `choose` | a kernel and sizes to device programs |
//! | `attention` | an attention of the plan as a problem of the kernel library |
//! | `product` | a matrix product of the plan as problems of the kernel library |
//! | `library` | attention with its log-sum-exp, and gradients, as steps of a plan |
//! | `bind` | a plan and sizes to steps over one block of memory |
//! | `host` | steps on the host |
//! | `interpret` | running a bound plan in the interpreter |
//! | `decode` | language models step by step, with a cache |
//! | `session` | running it on a device |
//! | `direct` | the same in a caller's stream, over a caller's memory |
//! | `attention_training` | attention with its log-sum-exp and its gradient there, by kernels of the library |
//! | `kept` | the same as bytes, for another process |
//! | `recordings` | graphs of its runs whose addresses come back |
//! | `losses` | cross-entropy there, by a kernel of the library |
//! | `norm_backward` | the gradient of a normalisation there, by kernels of the library |

mod attention;
mod attention_training;
mod bind;
mod choose;
mod constants;
pub mod decode;
mod direct;
mod host;
mod in_place;
mod interpret;
mod kept;
mod library;
mod losses;
mod norm_backward;
mod once;
mod product;
mod recordings;
mod session;

pub use attention_training::{
    AttentionCall, AttentionKernels, AttentionMask, AttentionPlaces, AttentionPlan,
};
pub use bind::{Bound, BoundStep, Place, Slot, bind, bind_at};
pub use choose::{Choice, Chooser, Launch, Source, Way};
pub use direct::{Direct, Fitted, Room};
pub use interpret::{Interpreted, interpret};
pub use kept::{Kept, KeptFolder};
pub use losses::{CrossEntropyTerms, Losses, LossesOf, LossesPlaces};
pub use norm_backward::{NormBackward, NormGradient, NormGradientPlaces};
pub use once::Once;
pub use session::{Executable, FAIL_RECORDING, MemoryReport, RunReport, Session, StepTime};
