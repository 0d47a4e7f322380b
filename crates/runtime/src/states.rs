//! What a session keeps from run to run: memory for the states of its plan.

use crate::memory::AlignedBuffer;
use crate::session::{Session, byte_len};
use tilewright_base::{Error, Result};
use tilewright_layout::Env;
use tilewright_plan::bind::concrete;

/// Memory of a state.
pub(crate) struct Kept {
    pub(crate) memory: AlignedBuffer,
    shape: Vec<usize>,
}

impl Session {
    /// Makes memory for the plan's states, all zero, for the sizes that their shapes need. Runs read and lengthen it;
    /// what is valid in it is what the sizes of a run say. Errors when a size is missing or memory is short.
    pub fn make_states(&mut self, env: &Env) -> Result<()> {
        self.states.clear();
        for state in &self.exe.plan().states {
            let shape = concrete(&state.shape, env)?;
            let bytes = byte_len(state.dtype, &shape)?;
            let memory = AlignedBuffer::new(bytes, "what is kept between runs")?;
            self.states.push(Kept { memory, shape });
        }
        Ok(())
    }

    /// Checks that the states' memory is what these sizes want.
    pub(crate) fn check_states(&self, env: &Env) -> Result<()> {
        let wanted = &self.exe.plan().states;
        if wanted.len() != self.states.len() {
            return Err(Error::user("there is no memory for what the plan keeps between runs"));
        }
        for (state, kept) in wanted.iter().zip(&self.states) {
            let (shape, valid) = (concrete(&state.shape, env)?, concrete(&state.valid, env)?);
            if shape != kept.shape {
                return Err(Error::user(format!(
                    "`{}` was made for {:?}, and these sizes want {shape:?}",
                    state.name, kept.shape
                )));
            }
            if valid.iter().zip(&shape).any(|(v, s)| v > s) {
                return Err(Error::user(format!(
                    "`{}` would be {valid:?}, and there is memory for {shape:?}",
                    state.name
                )));
            }
        }
        Ok(())
    }
}
