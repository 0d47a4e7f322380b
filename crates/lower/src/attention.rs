//! Attention in one kernel that never stores the scores.
//!
//! ```text
//! m = -inf, l = 0, acc[BQ,E] = 0
//! for each block of keys:
//!   s   = score(q k^T, masks...)            [BQ,BT]
//!   m'  = max(m, rowmax s)
//!   p   = exp(s - m'),  r = exp(m - m')     old sums are rescaled to the new maximum
//!   l   = l*r + rowsum p
//!   acc = acc*r + p v
//! y = acc / l
//! ```
//!
//! A row of which nothing was visible yet has maximum minus infinity; 0 is subtracted instead, so
//! that its weights are 0 and not NaN. If nothing ever becomes visible, `l` stays 0 and the row is
//! 0/0: NaN, as the softmax of such a row.

use crate::block::{Dag, DagOp, Emit, KernelParts, Pos};
use crate::contract::{finish_acc, give_anchor};
use crate::fuse::{AxisMap, Group};
use crate::gpu::Attended;
use crate::lowering::Lowering;
use crate::place::Place;
use crate::rows::func;
use crate::schedule::attention_tiles;
use crate::views::nominal;
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{Func, Op as ExprOp, Value};
use tilewright_graph::Op;
use tilewright_layout::Dim;
use tilewright_tile::{Bound, Operand, ParamId, ReduceKind, TileId, TileType};

impl Lowering<'_> {
    pub(crate) fn attention_group(&mut self, group: &Group) -> Result<()> {
        let graph = self.graph;
        let node = group.nodes.iter().map(|&n| &graph.nodes[n]).find_map(|n| match &n.op {
            Op::Attention(attrs) => Some((n, attrs)),
            _ => None,
        });
        let Some((node, attrs)) = node else { return Err(Error::bug("no attention in its group")) };
        let symbols = &graph.symbols;
        let mut dag = self.dag(group)?;
        let mut rest = None;
        if self.on_gpu() {
            rest = self.attention_apart(group, &mut dag)?;
        }
        let (q_shape, k_shape) = (graph.shape(node.inputs[0]), graph.shape(node.inputs[1]));
        let (rows, keys) = (q_shape[2].clone(), k_shape[2].clone());
        let width = group.shape[3].clone();
        let depth = q_shape[3].clone();
        let dtype = graph.dtype(node.inputs[0]);
        let acc_type = dtype.compute();
        // The score function over [B, H, S, T].
        let score_shape = vec![q_shape[0].clone(), q_shape[1].clone(), rows.clone(), keys.clone()];
        let mut scores = Dag::default();
        let score_type = attrs.score.params()[0].dtype;
        let mut args = vec![scores.push(DagOp::Anchor, vec![], vec![true; 4], score_type)];
        for &v in &node.inputs[3..] {
            let axes: AxisMap = (4 - graph.shape(v).len()..4).map(Some).collect();
            args.push(self.outside(&mut scores, v, &axes, &score_shape)?);
        }
        let score = scores.map(attrs.score.clone(), args, 4);
        let result_type = attrs.score.dtype();
        if result_type != acc_type {
            scores.map(func(&[result_type], |f, a| f.cast(a[0], acc_type)), vec![score], 4);
        }
        let last_score = scores.nodes.len() - 1;

        let operand = self.operand_type(dtype);
        let places: Vec<Place> = [0, 1, 2]
            .iter()
            .map(|&i| self.operand_place(node.inputs[i], operand))
            .collect::<Result<_>>()?;
        let places = self.with_near_columns(node, places)?;
        let batches = nominal(&(&q_shape[0] * &q_shape[1]), symbols);
        let stored: Vec<DType> = places.iter().map(|p| self.plan.buffers[p.buffer].dtype).collect();
        let knobs = self.product_knobs(operand, operand, acc_type);
        let sizes = [&rows, &keys].map(|d| nominal(d, symbols));
        let t = attention_tiles(self.target, &knobs, batches, sizes[0], sizes[1]);

        let mut k = KernelParts::new(self.kernel_name(group), symbols);
        let (bq, bq_name) = k.tile("BQ");
        let (bt, bt_name) = k.tile("BT");
        let tiles = vec![(bq_name, t.0), (bt_name, t.1)];
        let b = k.grid("pb", q_shape[0].clone());
        let h = k.grid("ph", q_shape[1].clone());
        let p = k.grid("pq", rows.ceil_div(&bq));
        let q0 = p * &bq;
        let per_group = match (q_shape[1].as_const(), k_shape[1].as_const()) {
            (Some(heads), Some(groups)) if groups > 0 => heads / groups,
            _ => 1,
        };
        let kv_head = h.floor_div(&Dim::new(per_group));
        let params: Vec<ParamId> = places
            .iter()
            .zip(&stored)
            .map(|(p, t)| k.input(p.buffer, *t, p.layout.clone()))
            .collect();
        let matrix = |k: &mut KernelParts, i: usize, head: &Dim, row: &Dim, n: &Dim, w: &Dim| {
            let index = vec![b.clone(), head.clone(), row.clone(), Dim::new(0)];
            let shape = vec![Dim::new(1), Dim::new(1), n.clone(), w.clone()];
            let tile = k.b.load(params[i], index, shape);
            let tile = k.b.reshape(tile, vec![n.clone(), w.clone()]);
            finish_acc(k, tile, stored[i], operand)
        };
        let q = matrix(&mut k, 0, &h, &q0, &bq, &depth);
        let row_type = TileType::new(acc_type, vec![bq.clone()]);
        let max = k.b.full(Value::Float(f64::NEG_INFINITY), row_type.clone());
        let sum = k.b.full(Value::Float(0.0), row_type);
        let acc =
            k.b.full(Value::Float(0.0), TileType::new(acc_type, vec![bq.clone(), width.clone()]));
        // Position t is hidden from row s when t > s + (T - S).
        let ahead = &keys - &rows;
        let end = match attrs.causal {
            true => keys.min_with(&(&q0 + &bq + &ahead)),
            false => keys.clone(),
        };
        let var = k.fresh("t");
        let (t, carried) = k.b.begin_for(&var, Dim::new(0), end.ceil_div(&bt), &[max, sum, acc]);
        let t0 = t * &bt;
        let keys_tile = matrix(&mut k, 1, &kv_head, &t0, &bt, &depth);
        let keys_tile = k.b.permute(keys_tile, &[1, 0]);
        let values_tile = matrix(&mut k, 2, &kv_head, &t0, &bt, &width);
        let zero =
            k.b.full(Value::Float(0.0), TileType::new(acc_type, vec![bq.clone(), bt.clone()]));
        let dots = k.b.mma(zero, q, keys_tile, None);
        let dots = finish_acc(&mut k, dots, acc_type, score_type);
        let canon: Vec<Vec<usize>> = (0..4).map(|a| vec![a]).collect();
        let pos = vec![
            Pos::unit(b.clone()),
            Pos::unit(h.clone()),
            Pos::tile(q0.clone(), bq.clone()),
            Pos::tile(t0.clone(), bt.clone()),
        ];
        let mut emit = Emit::new(&scores, &canon, pos);
        give_anchor(&mut emit, dots);
        let mut s = emit.tile(&mut k, last_score);
        if attrs.causal {
            s = hide_later(&mut k, s, acc_type, &(&q0 + ahead), &t0);
        }
        let bt_value = self.tile_value(&tiles, 1);
        let divides = keys.as_const().is_some_and(|n| n % bt_value == 0);
        if let Some(keys) = keys.as_const().filter(|&n| divides && n > 0 && !self.on_gpu()) {
            k.bound(&tiles[1].0, Bound::Divides(keys));
        }
        let limit = (!divides).then(|| &keys - &t0);
        let (max, sum, acc) = (carried[0], carried[1], carried[2]);
        let block_max = k.b.reduce(ReduceKind::Max, s, 1, limit.clone());
        let row = vec![bq.clone()];
        let two = |k: &mut KernelParts, f: Func, x: TileId, y: TileId| {
            let args = vec![k.b.plain(x), k.b.plain(y)];
            k.b.map(f, args, row.clone())
        };
        let new_max = two(&mut k, Func::binary(ExprOp::Max, acc_type), max, block_max);
        let safe = func(&[acc_type], |f, a| {
            let low = f.constant(f64::NEG_INFINITY, acc_type);
            let none = f.op(ExprOp::Eq, &[a[0], low]);
            let zero = f.constant(0.0, acc_type);
            f.op(ExprOp::Select, &[none, zero, a[0]])
        });
        let args = vec![k.b.plain(new_max)];
        let shift = k.b.map(safe, args, row.clone());
        let exp = |dtypes: &[DType]| {
            func(dtypes, |f, a| {
                let d = f.op(ExprOp::Sub, &[a[0], a[1]]);
                f.op(ExprOp::Exp, &[d])
            })
        };
        let rescale = two(&mut k, exp(&[acc_type; 2]), max, shift);
        let args = vec![k.b.plain(s), Operand { tile: shift, along: vec![0] }];
        let p = k.b.map(exp(&[acc_type; 2]), args, vec![bq.clone(), bt.clone()]);
        let block_sum = k.b.reduce(ReduceKind::Sum, p, 1, limit.clone());
        let total = func(&[acc_type; 3], |f, a| f.op(ExprOp::Fma, &[a[0], a[1], a[2]]));
        let args = [sum, rescale, block_sum].map(|t| k.b.plain(t)).to_vec();
        let new_sum = k.b.map(total, args, row.clone());
        let args = vec![k.b.plain(acc), Operand { tile: rescale, along: vec![0] }];
        let shape = vec![bq.clone(), width.clone()];
        let scaled = k.b.map(Func::binary(ExprOp::Mul, acc_type), args, shape.clone());
        // The sum above takes the weights as they are; the product takes them as its unit does.
        let weights = match operand == dtype {
            true => p,
            false => finish_acc(&mut k, p, acc_type, operand),
        };
        let new_acc = k.b.mma(scaled, weights, values_tile, limit);
        let results = k.b.end_for(&[new_max, new_sum, new_acc]);
        let divide = func(&[acc_type; 2], |f, a| {
            // The largest weight is 1: there is no sum where nothing is seen.
            let sum = match attrs.zeros {
                true => {
                    let (zero, one) = (f.constant(0.0, acc_type), f.constant(1.0, acc_type));
                    let none = f.op(ExprOp::Eq, &[a[1], zero]);
                    f.op(ExprOp::Select, &[none, one, a[1]])
                }
                false => a[1],
            };
            let y = f.op(ExprOp::Div, &[a[0], sum]);
            f.cast(y, dtype)
        });
        let args = vec![k.b.plain(results[2]), Operand { tile: results[1], along: vec![0] }];
        let out = k.b.map(divide, args, shape);

        let pos =
            vec![Pos::unit(b), Pos::unit(h), Pos::tile(q0, bq), Pos::tile(Dim::new(0), width)];
        let mut emit = Emit::new(&dag, &canon, pos);
        give_anchor(&mut emit, out);
        emit.store_all(&mut k);
        let note = self.note(group);
        let mut forms = Vec::new();
        if self.on_gpu() {
            let attended = Attended { node, attrs, places: &places, scores: &scores, dag: &dag };
            forms.extend(self.attention_form(&k, &attended));
        }
        self.launch_forms(k, tiles, knobs, forms, note)?;
        match rest {
            Some((name, dag, note)) => self.map_kernel(name, &dag, &group.shape, note),
            None => Ok(()),
        }
    }

    fn tile_value(&self, tiles: &[(String, i64)], i: usize) -> i64 {
        tiles.get(i).map_or(1, |t| t.1.max(1))
    }
}

/// Scores of keys later than `start + row` become minus infinity.
fn hide_later(k: &mut KernelParts, s: TileId, dtype: DType, start: &Dim, t0: &Dim) -> TileId {
    let shape = k.b.ty(s).shape.clone();
    let row = k.b.iota(DType::I64, 0, start.clone(), vec![shape[0].clone()]);
    let col = k.b.iota(DType::I64, 0, t0.clone(), vec![shape[1].clone()]);
    let hide = func(&[dtype, DType::I64, DType::I64], |f, a| {
        let later = f.op(ExprOp::Gt, &[a[2], a[1]]);
        let low = f.constant(f64::NEG_INFINITY, dtype);
        f.op(ExprOp::Select, &[later, low, a[0]])
    });
    let args = vec![
        k.b.plain(s),
        Operand { tile: row, along: vec![0] },
        Operand { tile: col, along: vec![1] },
    ];
    k.b.map(hide, args, shape)
}
