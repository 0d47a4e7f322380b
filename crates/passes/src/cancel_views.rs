//! Moves views towards the outputs until they cancel or are taken over.
//!
//! ```text
//! before: v2 = reshape [B,S,12,64] v1          after: v2 = map(v1) { x -> x * 0.125 }
//!         v3 = permute [0,2,1,3] v2                   v3 = reshape [B,S,12,64] v2
//!         v4 = map(v3) { x -> x * 0.125 }             v5 = contract bshd,bthd->bhst v3, ..
//!         v5 = contract bhsd,bhtd->bhst v4, ..
//! ```
//!
//! A permute costs a pass over memory only when nobody takes it over. Contractions name their axes
//! by letters, so a permute before or after one is a change of letters. Everything elementwise and
//! every operator along given axes commutes with it. So views sink:
//!
//! | pattern | becomes | when |
//! |---|---|---|
//! | `map (permute p a), ..` | `permute p (map a, ..)` | the other operands have the same permute, or are constants or one element |
//! | `map (reshape a), ..` | `reshape (map a, ..)` | the other operands are the same reshape of an equal shape, one element, or live in the last axes, which the reshape keeps; `a` is no permute that others read |
//! | `contract (permute a), b` | `contract a, b` | letters reordered |
//! | `permute (contract a, b)` | `contract a, b` | letters reordered; read only here |
//! | `contract (expand a), b` | `contract a, b` | stretched axes are letters whose extent `b` has |
//! | `contract (reshape a), b` | `reshape (contract a, b)` | the reshape joins axes that `b` does not have, or joins alike |
//! | `reduce`, `softmax`, `scan`, `arg` of `permute` | `permute` of it | axes renamed |
//! | `layer_norm (permute p a)` | `permute p (..)` | p keeps the normalised axes in place |
//! | `softmax`, `layer_norm` of `reshape` | `reshape` of it | the reshape keeps the axes from the first touched one on |
//! | `concat (permute p a), (permute p b)` | `permute p (concat a, b)` | |
//! | `reshape (permute (reshape a))` | `reshape (permute (reshape a))` | axes that the first merges and the second splits stay apart (`unmerge.rs`) |
//! | `permute p (expand a)` | `expand (permute p a)` | same rank |
//! | `permute (reshape (permute a))` | `reshape a` | the second permute undoes the first, axes that the reshape joins stay together |
//!
//! Each rule needs the view to be read only here, except where nothing is duplicated. All are exact
//! (the order of a reduction's sum is not part of its meaning).

use crate::edit::{Editor, Rewritten, inverse, permuted, rewrite};
use crate::manager::PassContext;
use crate::unmerge::unmerged;
use tilewright_base::Result;
use tilewright_expr::Func;
use tilewright_graph::{Graph, NodeId, Op, ValueId};
use tilewright_layout::Dim;

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    rewrite(graph, &mut rule)
}

fn rule(ed: &mut Editor<'_>, id: NodeId) -> Rewritten {
    let node = ed.graph.nodes[id].clone();
    let one = |v: Option<ValueId>| Ok(v.map(|v| vec![v]));
    let out = node.outputs.first().copied();
    match &node.op {
        Op::Map(func) => {
            if let Some(v) = map_of_permutes(ed, func, &node.inputs)? {
                return Ok(Some(vec![v]));
            }
            one(map_of_reshapes(ed, func, &node.inputs)?)
        }
        Op::Contract { .. } => one(contract(ed, &node.op, &node.inputs)?),
        Op::Permute(perm) => one(permute(ed, perm, node.inputs[0])?),
        Op::Reduce { .. }
        | Op::ArgReduce { .. }
        | Op::Scan { .. }
        | Op::Softmax { .. }
        | Op::LayerNorm { .. }
        | Op::RmsNorm { .. } => {
            let Some(out) = out else { return Ok(None) };
            if let Some(v) = along_axes_of_permute(ed, &node.op, &node.inputs)? {
                return Ok(Some(vec![v]));
            }
            one(rows_of_reshape(ed, &node.op, &node.inputs, out)?)
        }
        Op::Concat(axis) => one(concat(ed, *axis, &node.inputs)?),
        Op::Reshape(to) => one(unmerged(ed, to, node.inputs[0])?),
        _ => Ok(None),
    }
}

/// The permutation and its operand, when `v` is a permute, whoever reads it.
fn as_permute(ed: &Editor<'_>, v: ValueId) -> Option<(Vec<usize>, ValueId)> {
    match ed.node_of(v) {
        Some(node) => match &node.op {
            Op::Permute(perm) => Some((perm.clone(), node.inputs[0])),
            _ => None,
        },
        None => None,
    }
}

/// The operand, when `v` is a reshape.
fn as_reshape(ed: &Editor<'_>, v: ValueId) -> Option<ValueId> {
    match ed.node_of(v) {
        Some(node) if matches!(node.op, Op::Reshape(_)) => Some(node.inputs[0]),
        _ => None,
    }
}

fn one_element(shape: &[Dim]) -> bool {
    shape.iter().all(|d| d.is(1))
}

fn map_of_permutes(
    ed: &mut Editor<'_>,
    func: &Func,
    inputs: &[ValueId],
) -> Result<Option<ValueId>> {
    let mut perm: Option<Vec<usize>> = None;
    for &v in inputs {
        if let Some((p, _)) = as_permute(ed, v) {
            // Repeated operands are one reader.
            let here = inputs.iter().filter(|&&w| w == v).count() as u32;
            if perm.as_ref().is_some_and(|known| *known != p) || ed.uses(v) > here {
                return Ok(None);
            }
            perm = Some(p);
        }
    }
    let Some(perm) = perm else { return Ok(None) };
    let rank = perm.len();
    let back = inverse(&perm);
    // First see that all operands can follow, then build.
    for &v in inputs {
        let shape = ed.graph.shape(v);
        let follows = as_permute(ed, v).is_some()
            || (shape.len() <= rank && (one_element(shape) || ed.graph.as_const(v).is_some()));
        if !follows {
            return Ok(None);
        }
    }
    let mut operands = Vec::with_capacity(inputs.len());
    for &v in inputs {
        operands.push(if let Some((_, source)) = as_permute(ed, v) {
            source
        } else if one_element(ed.graph.shape(v)) {
            v
        } else {
            let mut shape = vec![Dim::new(1); rank - ed.graph.shape(v).len()];
            shape.extend_from_slice(ed.graph.shape(v));
            let full = ed.reshape(v, &shape)?;
            // Drop the leading ones again: `[D,1,1]` stays, `[1,1,D]` reads better as `[D]`.
            let moved = ed.permuted_constant(full, &back)?;
            let shape = ed.graph.shape(moved).to_vec();
            let lead = shape.iter().take_while(|d| d.is(1)).count();
            ed.reshape(moved, &shape[lead..])?
        });
    }
    let inner = ed.map(func.clone(), &operands)?;
    Ok(Some(ed.permute(inner, &perm)?))
}

/// How many of the last axes two shapes have in common.
fn common_suffix(a: &[Dim], b: &[Dim]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count()
}

/// A permute that others read too: its reshape is stored for them, and what a map makes of it can be computed from that memory. Behind
/// the reshape the map would be stored as well.
fn turned_for_others(ed: &Editor<'_>, v: ValueId) -> bool {
    as_permute(ed, v).is_some() && !ed.only_here(v)
}

fn map_of_reshapes(
    ed: &mut Editor<'_>,
    func: &Func,
    inputs: &[ValueId],
) -> Result<Option<ValueId>> {
    let Some((first, source)) = inputs.iter().find_map(|&v| as_reshape(ed, v).map(|s| (v, s)))
    else {
        return Ok(None);
    };
    let to = ed.graph.shape(first).to_vec();
    let from = ed.graph.shape(source).to_vec();
    let kept = common_suffix(&from, &to);
    let mut operands = Vec::with_capacity(inputs.len());
    for &v in inputs {
        let shape = ed.graph.shape(v).to_vec();
        let reshape = as_reshape(ed, v);
        let real = shape.len() - shape.iter().take_while(|d| d.is(1)).count();
        if let Some(s) = reshape
            && ed.graph.shape(s) == from
            && shape == to
        {
            let here = inputs.iter().filter(|&&w| w == v).count() as u32;
            if ed.uses(v) > here || turned_for_others(ed, s) {
                return Ok(None);
            }
            operands.push(s);
        } else if shape.len() <= to.len() && real <= kept {
            // Lives in the axes that the reshape keeps. Its leading ones must not raise the rank.
            operands.push(ed.reshape(v, &shape[shape.len() - real..])?);
        } else {
            return Ok(None);
        }
    }
    let inner = ed.map(func.clone(), &operands)?;
    if ed.graph.shape(inner) != from {
        // The others stretch it.
        return Ok(None);
    }
    Ok(Some(ed.reshape(inner, &to)?))
}

fn reorder(letters: &str, perm: &[usize]) -> String {
    let letters: Vec<char> = letters.chars().collect();
    perm.iter().filter_map(|&p| letters.get(p)).collect()
}

fn contract(ed: &mut Editor<'_>, op: &Op, inputs: &[ValueId]) -> Result<Option<ValueId>> {
    let Op::Contract { lhs, rhs, out, acc, dtype } = op else { return Ok(None) };
    let mut letters = [lhs.clone(), rhs.clone()];
    let mut operands = [inputs[0], inputs[1]];
    let mut changed = false;
    for side in 0..2 {
        let v = operands[side];
        if let Some((perm, source)) = as_permute(ed, v) {
            // `v[i] = source[perm[i]]`: source axis j carries the letter of the axis that it became.
            letters[side] = reorder(&letters[side], &inverse(&perm));
            operands[side] = source;
            changed = true;
        } else if let Some(source) =
            unexpanded(ed, v, &letters[side], operands[1 - side], &letters[1 - side])
        {
            operands[side] = source;
            changed = true;
        }
    }
    let make = |letters: &[String; 2], out: String| Op::Contract {
        lhs: letters[0].clone(),
        rhs: letters[1].clone(),
        out,
        acc: *acc,
        dtype: *dtype,
    };
    if changed {
        return Ok(Some(ed.op(make(&letters, out.clone()), &operands)?));
    }
    for which in [[true, true], [true, false], [false, true]] {
        if let Some(split) = split_letters(ed, &operands, &letters, out, which) {
            let shape: Vec<Dim> =
                out.chars().map(|l| letter_extent(ed, l, lhs, inputs[0], rhs, inputs[1])).collect();
            let inner = ed.op(make(&split.letters, split.out), &split.sources)?;
            return Ok(Some(ed.reshape(inner, &shape)?));
        }
    }
    Ok(None)
}

fn letter_extent(ed: &Editor<'_>, l: char, lhs: &str, a: ValueId, rhs: &str, b: ValueId) -> Dim {
    let of = |letters: &str, v: ValueId| {
        letters.chars().position(|x| x == l).map(|i| ed.graph.shape(v)[i].clone())
    };
    match (of(lhs, a), of(rhs, b)) {
        (Some(x), Some(y)) => {
            if x.is(1) {
                y
            } else {
                x
            }
        }
        (Some(x), None) | (None, Some(x)) => x,
        (None, None) => Dim::new(1),
    }
}

/// The source of an expand whose stretched axes are letters that the other operand spans.
fn unexpanded(
    ed: &Editor<'_>,
    v: ValueId,
    letters: &str,
    other: ValueId,
    other_letters: &str,
) -> Option<ValueId> {
    let node = ed.node_of(v)?;
    if !matches!(node.op, Op::Expand(_)) {
        return None;
    }
    let source = node.inputs[0];
    let (small, large) = (ed.graph.shape(source), ed.graph.shape(v));
    if small.len() != large.len() {
        return None;
    }
    letters
        .chars()
        .enumerate()
        .all(|(i, l)| {
            small[i] == large[i]
                || other_letters
                    .chars()
                    .position(|o| o == l)
                    .is_some_and(|at| ed.graph.shape(other)[at] == large[i])
        })
        .then_some(source)
}

/// A contraction over axes as they were before a reshape joined them.
struct Split {
    sources: [ValueId; 2],
    letters: [String; 2],
    out: String,
}

/// For operands (those that `which` says) that are reshapes joining neighbouring axes: the
/// contraction over the axes as they were. A joined axis that both operands have must be joined
/// from the same extents in both.
fn split_letters(
    ed: &Editor<'_>,
    operands: &[ValueId; 2],
    letters: &[String; 2],
    out: &str,
    which: [bool; 2],
) -> Option<Split> {
    let mut sources = *operands;
    // Per side and letter: the extents that it is made of.
    let mut made_of: [Vec<(char, Vec<Dim>)>; 2] = [Vec::new(), Vec::new()];
    for side in 0..2 {
        let shape = ed.graph.shape(operands[side]);
        if which[side] {
            sources[side] = as_reshape(ed, operands[side])?;
            let from = ed.graph.shape(sources[side]);
            let mut at = 0;
            for (letter, count) in letters[side].chars().zip(joined_axes(from, shape)?) {
                made_of[side].push((letter, from[at..at + count].to_vec()));
                at += count;
            }
        } else {
            made_of[side].extend(
                letters[side]
                    .chars()
                    .zip(shape.iter().map(std::slice::from_ref).map(<[Dim]>::to_vec)),
            );
        }
    }
    let mut fresh = ('a'..='z')
        .chain('A'..='Z')
        .filter(|c| ![&*letters[0], &*letters[1], out].iter().any(|s| s.contains(*c)));
    let mut names: Vec<(char, String)> = Vec::new();
    for (letter, extents) in made_of.iter().flatten() {
        if names.iter().any(|(l, _)| l == letter) {
            continue;
        }
        let mut both = made_of.iter().filter_map(|m| m.iter().find(|(l, _)| l == letter));
        let single = extents.len() == 1 && both.clone().all(|(_, e)| e.len() == 1);
        if !single && both.any(|(_, e)| e != extents) {
            return None;
        }
        let name = match single {
            true => letter.to_string(),
            false => {
                let name: Option<String> = extents.iter().map(|_| fresh.next()).collect();
                name?
            }
        };
        names.push((*letter, name));
    }
    let spell = |letters: &str| -> String {
        letters
            .chars()
            .filter_map(|l| names.iter().find(|(n, _)| *n == l).map(|(_, name)| name.as_str()))
            .collect()
    };
    Some(Split { sources, letters: [spell(&letters[0]), spell(&letters[1])], out: spell(out) })
}

/// For a reshape that only joins neighbouring axes: how many axes each result axis is made of.
fn joined_axes(from: &[Dim], to: &[Dim]) -> Option<Vec<usize>> {
    let mut groups = Vec::with_capacity(to.len());
    let mut at = 0;
    for size in to {
        let start = at;
        let mut product = from.get(at)?.clone();
        at += 1;
        while product != *size {
            product = product * from.get(at)?;
            at += 1;
        }
        groups.push(at - start);
    }
    // Trailing axes of extent 1 belong to the last group.
    while from.get(at).is_some_and(|d| d.is(1)) {
        at += 1;
        *groups.last_mut()? += 1;
    }
    (at == from.len()).then_some(groups)
}

fn permute(ed: &mut Editor<'_>, perm: &[usize], x: ValueId) -> Result<Option<ValueId>> {
    let Some(node) = ed.node_of(x).cloned() else { return Ok(None) };
    match &node.op {
        Op::Contract { lhs, rhs, out, acc, dtype } if ed.only_here(x) => {
            let op = Op::Contract {
                lhs: lhs.clone(),
                rhs: rhs.clone(),
                out: reorder(out, perm),
                acc: *acc,
                dtype: *dtype,
            };
            Ok(Some(ed.op(op, &node.inputs)?))
        }
        Op::Expand(shape) if ed.graph.shape(node.inputs[0]).len() == perm.len() => {
            let shape = permuted(shape, perm);
            let moved = ed.permute(node.inputs[0], perm)?;
            Ok(Some(ed.expand(moved, &shape)?))
        }
        Op::Reshape(to) => {
            let Some((first, source)) = as_permute(ed, node.inputs[0]) else { return Ok(None) };
            let groups = joined_axes(ed.graph.shape(node.inputs[0]), to);
            let Some(groups) = groups else { return Ok(None) };
            let starts: Vec<usize> =
                groups.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
            let apart = perm.iter().flat_map(|&p| starts[p]..starts[p] + groups[p]);
            let undone = apart.enumerate().all(|(place, axis)| first[axis] == place);
            undone.then(|| ed.reshape(source, &permuted(to, perm))).transpose()
        }
        _ => Ok(None),
    }
}

/// An operator along axes, on a permuted operand: the axes get their old names.
fn along_axes_of_permute(
    ed: &mut Editor<'_>,
    op: &Op,
    inputs: &[ValueId],
) -> Result<Option<ValueId>> {
    let Some((perm, source)) = as_permute(ed, inputs[0]) else { return Ok(None) };
    if !ed.only_here(inputs[0]) {
        return Ok(None);
    }
    let mut dropped: Vec<usize> = Vec::new();
    let mut operands = inputs.to_vec();
    operands[0] = source;
    let inner = match op {
        Op::Reduce { kind, axes, keep } => {
            let mut old: Vec<usize> = axes.iter().map(|&a| perm[a]).collect();
            old.sort_unstable();
            if !keep {
                dropped.clone_from(axes);
            }
            Op::Reduce { kind: *kind, axes: old, keep: *keep }
        }
        Op::ArgReduce { kind, axis, keep, last } => {
            if !keep {
                dropped.push(*axis);
            }
            Op::ArgReduce { kind: *kind, axis: perm[*axis], keep: *keep, last: *last }
        }
        Op::Scan { kind, axis, exclusive, reverse } => {
            Op::Scan { kind: *kind, axis: perm[*axis], exclusive: *exclusive, reverse: *reverse }
        }
        Op::Softmax { axis, log } => Op::Softmax { axis: perm[*axis], log: *log },
        Op::LayerNorm { axis, .. } | Op::RmsNorm { axis, .. } => {
            let fixed = (*axis..perm.len()).all(|i| perm[i] == i);
            let small = inputs[1..].iter().all(|&v| ed.graph.shape(v).len() <= perm.len() - axis);
            if !fixed || !small {
                return Ok(None);
            }
            op.clone()
        }
        _ => return Ok(None),
    };
    let result = ed.op(inner, &operands)?;
    // The axes that are left, numbered anew.
    let left: Vec<usize> =
        (0..perm.len()).filter(|i| !dropped.contains(i)).map(|i| perm[i]).collect();
    let rank_of = |p: usize| left.iter().filter(|&&q| q < p).count();
    let outer: Vec<usize> = left.iter().map(|&p| rank_of(p)).collect();
    Ok(Some(ed.permute(result, &outer)?))
}

/// Softmax and norms work on whole rows: a reshape that keeps the row can wait.
fn rows_of_reshape(
    ed: &mut Editor<'_>,
    op: &Op,
    inputs: &[ValueId],
    out: ValueId,
) -> Result<Option<ValueId>> {
    let Some(source) = as_reshape(ed, inputs[0]) else { return Ok(None) };
    if !ed.only_here(inputs[0]) {
        return Ok(None);
    }
    let (from, to) = (ed.graph.shape(source).to_vec(), ed.graph.shape(inputs[0]).to_vec());
    let (Op::Softmax { axis, .. } | Op::LayerNorm { axis, .. } | Op::RmsNorm { axis, .. }) = op
    else {
        return Ok(None);
    };
    let row = to.len() - axis;
    let small = inputs[1..].iter().all(|&v| ed.graph.shape(v).len() <= row);
    if common_suffix(&from, &to) < row || !small {
        return Ok(None);
    }
    let at = from.len() - row;
    let inner = match op {
        Op::Softmax { log, .. } => Op::Softmax { axis: at, log: *log },
        Op::LayerNorm { eps, .. } => Op::LayerNorm { axis: at, eps: *eps },
        Op::RmsNorm { eps, .. } => Op::RmsNorm { axis: at, eps: *eps },
        _ => return Ok(None),
    };
    let mut operands = inputs.to_vec();
    operands[0] = source;
    let result = ed.op(inner, &operands)?;
    let shape = ed.graph.shape(out).to_vec();
    Ok(Some(ed.reshape(result, &shape)?))
}

fn concat(ed: &mut Editor<'_>, axis: usize, inputs: &[ValueId]) -> Result<Option<ValueId>> {
    let mut sources = Vec::with_capacity(inputs.len());
    let mut perm: Option<Vec<usize>> = None;
    for &v in inputs {
        let Some((p, source)) = as_permute(ed, v) else { return Ok(None) };
        if !ed.only_here(v) || perm.as_ref().is_some_and(|known| *known != p) {
            return Ok(None);
        }
        perm = Some(p);
        sources.push(source);
    }
    let Some(perm) = perm else { return Ok(None) };
    let joined = ed.op(Op::Concat(perm[axis]), &sources)?;
    Ok(Some(ed.permute(joined, &perm)?))
}
