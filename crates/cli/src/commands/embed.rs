//! `tw embed`: sentences to vectors, and the nearest ones to a query.

use crate::args::EmbedArgs;
use crate::output::Output;
use tilewright::Result;
use tilewright_base::Error;

pub(crate) fn run(_args: &EmbedArgs, _output: &Output) -> Result<()> {
    Err(Error::unsupported("embedding"))
}
