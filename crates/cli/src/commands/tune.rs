//! `tw tune model`: searches schedules for a model's kernels on this processor.

use crate::args::TuneModelArgs;
use crate::output::{Output, say};
use std::time::Duration;
use tilewright::Result;
use tilewright::tune::TuneOptions;
use tilewright_base::Error;

pub(crate) fn model(args: &TuneModelArgs, output: &Output) -> Result<()> {
    if super::on_gpu(&args.model)? {
        return Err(Error::unsupported("the search for a model's kernels on a GPU")
            .with_hint("`tw tune gemm` searches for matrix products"));
    }
    let compiler = super::compiler(&args.model)?;
    let model = super::open(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let options = TuneOptions {
        limit: Duration::from_secs_f64(args.seconds.clamp(0.0, 86_400.0)),
        rounds: args.rounds,
    };
    let report = compiler.tune(&model.graph, &inputs, &options, &mut |line| say(line))?;
    let value = serde_json::to_value(&report).map_err(|e| Error::bug(e.to_string()))?;
    output.result(&report.text(), &value);
    Ok(())
}
