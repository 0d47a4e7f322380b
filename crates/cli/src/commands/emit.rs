//! `tw inspect --emit triton`: the kernels of a model, or one tile program, as Triton source.

use super::{compiler, pairs};
use crate::args::{InspectArgs, NO_MODEL};
use crate::output::Output;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use tilewright::{Result, Stage};
use tilewright_base::{Error, Kind};
use tilewright_emit_triton::{Emitted, Knobs, emit_kernel};
use tilewright_tile::{Kernel, Schedule, verify, verify_schedule};

pub(crate) fn run(args: &InspectArgs, output: &Output) -> Result<()> {
    let (sizes, knobs) = settings(&args.set)?;
    let kernels = match &args.tile {
        Some(_) if args.model.model.as_os_str() != NO_MODEL => {
            return Err(Error::user("a model and --tile were given").with_hint("give one of them"));
        }
        Some(file) => vec![tile_file(file, &sizes)?],
        None => of_model(args, &sizes)?,
    };
    let (mut modules, mut failures) = (Vec::new(), Vec::new());
    for (kernel, schedule) in &kernels {
        match emit_kernel(kernel, schedule, knobs) {
            Ok(module) => modules.push(module),
            Err(e) if e.kind() == Kind::Unsupported => failures.push((&kernel.name, e)),
            Err(e) => return Err(e),
        }
    }
    // What can be said is printed, whatever cannot.
    write(&modules, args.out.as_deref(), output)?;
    match failures.len() {
        0 => Ok(()),
        1 if kernels.len() == 1 => Err(failures.remove(0).1),
        n => {
            let message = format!("{n} of {} kernels are unsupported as Triton", kernels.len());
            let notes = failures
                .iter()
                .flat_map(|(name, e)| e.notes().iter().map(move |n| format!("@{name}: {n}")));
            Err(notes.fold(Error::unsupported(message), Error::with_note))
        }
    }
}

/// Tile sizes by name.
type Sizes = Vec<(Arc<str>, i64)>;

/// `--set`: tile sizes, and the knobs of a launch.
fn settings(list: &[String]) -> Result<(Sizes, Knobs)> {
    let (mut sizes, mut knobs) = (Vec::new(), Knobs::default());
    for (name, value) in pairs(list, "--set BM=128")? {
        let bad = || Error::user(format!("{name}: `{value}` is not a positive number"));
        let number = value.parse::<u32>().ok().filter(|&n| n > 0).ok_or_else(bad)?;
        match name {
            "num_warps" => knobs.num_warps = number,
            "num_stages" => knobs.num_stages = number,
            _ => sizes.push((name.into(), number.into())),
        }
    }
    Ok((sizes, knobs))
}

/// One tile program from a file; what is wrong with it is the user's.
fn tile_file(file: &Path, sizes: &Sizes) -> Result<(Arc<Kernel>, Schedule)> {
    let name = file.display().to_string();
    let text = std::fs::read_to_string(file)
        .map_err(|e| Error::user(format!("{name} cannot be read: {e}")))?;
    let kernel = Kernel::parse(&name, &text)?;
    let mut schedule = Schedule::default();
    schedule.tiles.extend(sizes.iter().cloned());
    let theirs = |e: Error| {
        let error = Error::user(e.message()).with_context(name.clone());
        e.notes().iter().fold(error, |error, note| error.with_note(note.clone()))
    };
    verify(&kernel).map_err(theirs)?;
    verify_schedule(&kernel, &schedule).map_err(|e| {
        theirs(e).with_hint(match kernel.tiles.first() {
            Some(tile) => format!("tile sizes are given as --set {tile}=64"),
            None => "the program has no tile sizes".to_string(),
        })
    })?;
    Ok((Arc::new(kernel), schedule))
}

/// The kernels of a model's plan, with its schedules; sizes that were given replace theirs.
fn of_model(args: &InspectArgs, sizes: &Sizes) -> Result<Vec<(Arc<Kernel>, Schedule)>> {
    if args.model.model.as_os_str() == NO_MODEL {
        return Err(Error::user("neither a model nor a tile program was given")
            .with_hint("tw inspect MODEL --emit triton, or tw inspect --tile FILE --emit triton"));
    }
    let compiler = compiler(&args.model)?;
    let model = super::open(&args.model)?;
    let (mut kernels, mut names) = (Vec::new(), Vec::new());
    compiler.compile_observed(model.graph, &mut |stage| {
        let Stage::Plan(plan) = stage else { return };
        for (_, planned) in plan.kernels.iter() {
            let name = &planned.kernel.name;
            names.push(name.clone());
            if args.kernel.as_deref().is_some_and(|part| !name.contains(part)) {
                continue;
            }
            let mut schedule = planned.schedule.clone();
            for (tile, size) in sizes {
                schedule.tiles.entry(tile.clone()).and_modify(|s| *s = *size);
            }
            kernels.push((planned.kernel.clone(), schedule));
        }
    })?;
    if kernels.is_empty() && !names.is_empty() {
        return Err(super::inspect::no_kernel(args, &names));
    }
    Ok(kernels)
}

/// To files, or one after the other.
fn write(modules: &[Emitted], folder: Option<&Path>, output: &Output) -> Result<()> {
    let json: Vec<_> =
        modules.iter().map(|m| json!({"kernel": m.name, "python": m.python})).collect();
    let json = json!({ "modules": json });
    let Some(folder) = folder else {
        let text: Vec<&str> = modules.iter().map(|m| m.python.as_str()).collect();
        if !text.is_empty() {
            output.result(&text.join("\n\n"), &json);
        }
        return Ok(());
    };
    let cannot = |what: &Path, e: std::io::Error| {
        Error::user(format!("{} cannot be written: {e}", what.display()))
    };
    std::fs::create_dir_all(folder).map_err(|e| cannot(folder, e))?;
    let mut names = BTreeSet::new();
    let mut text = String::new();
    for module in modules {
        let mut name = format!("{}.py", module.name);
        let mut number = 1;
        while !names.insert(name.clone()) {
            number += 1;
            name = format!("{}_{number}.py", module.name);
        }
        let file = folder.join(name);
        crate::npy::write_whole(&file, module.python.as_bytes())?;
        text += &format!("{}\n", file.display());
    }
    output.result(&text, &json);
    Ok(())
}
