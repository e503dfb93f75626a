//! Gradients on every GPU that there is, the emulated one among them, against those on the CPU.

#![cfg(feature = "gpu")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

#[expect(dead_code, reason = "other tests take the rest")]
mod common;

use common::{numbers, on_each, rounded, runs, widened};
use half::bf16;
use plumb_kernels::Element;
use plumb_kernels::attention::{self, PAGE, Rule, Run, Span};
use plumb_kernels::gpu::{self, CutRule, Gpu, Partials, Pieces};
use plumb_kernels::gradient::{self, Keys};
use plumb_kernels::norm::Norm;
use plumb_kernels::rotary::Rotary;

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    rotated: usize,
    softcap: Option<f32>,
    window: Option<usize>,
    q_norm: bool,
    k_norm: bool,
}

const CASE: Case =
    Case { heads: 4, kv_heads: 2, dim: 64, rotated: 64, softcap: None, window: None, q_norm: false, k_norm: false };

const CASES: [Case; 7] = [
    CASE,
    Case { heads: 3, kv_heads: 3, dim: 6, rotated: 4, ..CASE },
    Case { heads: 6, kv_heads: 2, dim: 20, rotated: 0, softcap: Some(2.0), k_norm: true, ..CASE },
    Case { heads: 6, kv_heads: 1, dim: 80, rotated: 20, window: Some(40), q_norm: true, ..CASE },
    Case { heads: 4, kv_heads: 1, dim: 128, rotated: 128, q_norm: true, k_norm: true, ..CASE },
    Case { heads: 2, kv_heads: 1, dim: 256, rotated: 256, softcap: Some(2.0), window: Some(33), ..CASE },
    Case { heads: 33, kv_heads: 1, dim: 16, rotated: 16, ..CASE },
];

/// Position, length, and pages of sequences: a tree of which two branches share three pages and a third only two, a
/// sequence in two parts, and one by itself.
const SPANS: [(usize, usize, &[u32]); 7] = [
    (0, 96, &[7, 3, 9]),
    (96, 21, &[7, 3, 9, 0]),
    (0, 32, &[1]),
    (96, 40, &[7, 3, 9, 5, 2]),
    (64, 5, &[7, 3, 6]),
    (32, 18, &[1, 4]),
    (0, 33, &[8, 10]),
];
const PAGES: u32 = 11;
const POSITIONS: usize = 136;

/// These spans one after the other.
fn lay_out<'a>(spans: &[(usize, usize, &'a [u32])]) -> (Vec<Span<'a>>, Vec<Run>) {
    let (mut laid, mut cut, mut row) = (Vec::new(), Vec::new(), 0);
    for (position, len, pages) in spans.iter().copied() {
        laid.push(Span { row, len, position, pages });
        cut.extend(runs(row, position, len, pages));
        row += len;
    }
    (laid, cut)
}

impl Case {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn rule(&self) -> Rule {
        // Sharper than is usual, so that a wrong weight shows.
        let scale = 3.0 / (self.dim as f32).sqrt();
        Rule { heads: self.heads, head_dim: self.dim, scale, softcap: self.softcap, window: self.window }
    }

    fn rotary(&self) -> Rotary {
        Rotary::new(&(0..self.rotated / 2).map(|i| 0.3 / (i + 1) as f32).collect::<Vec<_>>(), POSITIONS)
    }

    /// Of q and of k.
    fn norms(&self) -> [Option<Norm>; 2] {
        let norm = |seed| Norm::Rms { weight: numbers(self.dim, seed), eps: 1e-3 };
        [self.q_norm.then(|| norm(11)), self.k_norm.then(|| norm(12))]
    }

    fn qkv<E: Element>(&self, rows: usize) -> Vec<E> {
        rounded(&numbers(rows * self.width(), 5))
    }

    fn cut_rule(&self) -> CutRule {
        CutRule {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.dim,
            invariant: false,
            partial_bytes: gpu::PARTIAL_BYTES,
        }
    }

    fn d_out<E: Element>(&self, rows: usize) -> Vec<E> {
        rounded(&numbers(rows * self.heads * self.dim, 6))
    }
}

/// What goes back through attention and what makes ready for it.
struct Gradients<E> {
    dqkv: Vec<f32>,
    unprepared: Vec<E>,
    /// Of the norms of q and k, added to [`before`].
    norms: [Vec<f32>; 2],
}

/// What a norm's gradient is added to.
fn before(norm: Option<&Norm>) -> Vec<f32> {
    numbers(norm.map_or(0, Norm::width), 9)
}

fn on_cpu<E: Element>(case: Case, spans: &[Span<'_>], runs: &[Run], qkv: &[E], d_out: &[E]) -> Gradients<E> {
    let keys = Keys::new(spans);
    let (rotary, norms) = (case.rotary(), case.norms());
    let mut kv = attention::KvPages::<E>::new(1, case.kv_heads, case.dim, PAGES as usize).unwrap();
    let how = attention::Prepare {
        heads: case.heads,
        head_dim: case.dim,
        q_norm: norms[0].as_ref(),
        k_norm: norms[1].as_ref(),
        rotary: &rotary,
    };
    let mut q = vec![E::default(); keys.rows() * case.heads * attention::padded(case.dim)];
    attention::prepare(&widened(qkv), 0, runs, how, &mut q, &mut kv, 0);
    let mut dqkv = vec![f32::NAN; qkv.len()];
    gradient::attention(&q, &kv, 0, &keys, case.rule(), d_out, &mut dqkv);
    let mut unprepared = vec![E::default(); qkv.len()];
    let [mut of_q, mut of_k] = norms.each_ref().map(|norm| before(norm.as_ref()));
    gradient::unprepare(&dqkv, qkv, &keys, how, &mut of_q, &mut of_k, &mut unprepared);
    Gradients { dqkv, unprepared, norms: [of_q, of_k] }
}

/// Pages in which there was something else before.
fn used_pages<E: Element>(gpu: &Gpu, case: Case) -> gpu::KvPages<E> {
    let mut kv = gpu::KvPages::new(gpu, 1, case.kv_heads, case.dim, PAGES as usize).unwrap();
    let spans: Vec<_> = (0..PAGES).map(|page| [page]).collect();
    let spans: Vec<_> = spans.iter().map(|pages| (0, PAGE, &pages[..])).collect();
    let (spans, runs) = lay_out(&spans);
    let mut pieces = Pieces::new(gpu);
    pieces.set::<E>(&spans, &runs, case.cut_rule(), spans.len() * PAGE).unwrap();
    let nothing = gpu.upload(&vec![E::from_f32(f32::NAN); pieces.rows() * case.width()]).unwrap();
    let mut q = gpu.zeros(pieces.rows() * kv.q_width(case.heads)).unwrap();
    let angles = gpu.empty();
    let how = gpu::Prepare { heads: case.heads, q_norm: None, k_norm: None, table: angles.all(), rotated: 0 };
    gpu.prepare(nothing.all(), &pieces, 0, how, q.all_mut(), &mut kv, 0).unwrap();
    kv
}

fn on_gpu<E: Element>(gpu: &Gpu, case: Case, spans: &[Span<'_>], runs: &[Run], qkv: &[E], d_out: &[E]) -> Gradients<E> {
    let (rule, norms) = (case.rule(), case.norms());
    let [q_norm, k_norm] = norms.each_ref().map(|norm| norm.as_ref().map(|norm| gpu::Norm::new(gpu, norm).unwrap()));
    let angles = gpu.upload(case.rotary().table()).unwrap();
    let how = gpu::Prepare {
        heads: case.heads,
        q_norm: q_norm.as_ref(),
        k_norm: k_norm.as_ref(),
        table: angles.all(),
        rotated: case.rotated,
    };
    let mut kv = used_pages::<E>(gpu, case);
    let mut pieces = Pieces::new(gpu);
    let rows = qkv.len() / case.width();
    pieces.set::<E>(spans, runs, case.cut_rule(), rows).unwrap();
    let (qkv, d_out) = (gpu.upload(qkv).unwrap(), gpu.upload(d_out).unwrap());
    let mut q = gpu.zeros(rows * kv.q_width(case.heads)).unwrap();
    gpu.prepare(qkv.all(), &pieces, 0, how, q.all_mut(), &mut kv, 0).unwrap();
    let mut out = gpu.zeros(rows * case.heads * case.dim).unwrap();
    let mut partials = Partials::new(gpu);
    let mut log_sums = gpu.zeros(rows * case.heads).unwrap();
    let sums = Some(log_sums.all_mut());
    gpu.attention(q.all(), &kv, 0, &pieces, rule, &mut partials, out.all_mut(), sums).unwrap();

    let mut back = gpu::gradient::Attention::new(gpu);
    back.set(&Keys::new(spans), case.group()).unwrap();
    assert_eq!(back.rows(), rows);
    let mut dqkv = gpu.upload(&vec![f32::NAN; rows * case.width()]).unwrap();
    back.backward(q.all(), &kv, 0, rule, out.all(), log_sums.all(), d_out.all(), dqkv.all_mut()).unwrap();
    let [mut of_q, mut of_k] = norms.each_ref().map(|norm| gpu.upload(&before(norm.as_ref())).unwrap());
    let mut unprepared = gpu.zeros::<E>(dqkv.len()).unwrap();
    back.unprepare(dqkv.all(), qkv.all(), case.dim, how, of_q.all_mut(), of_k.all_mut(), unprepared.all_mut()).unwrap();
    Gradients {
        dqkv: dqkv.to_vec().unwrap(),
        unprepared: unprepared.to_vec().unwrap(),
        norms: [of_q.to_vec().unwrap(), of_k.to_vec().unwrap()],
    }
}

/// Errors are measured by the largest number that is expected: where slopes cancel, all that is left is their errors.
#[track_caller]
fn assert_near(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance * largest, "{what} {i}: {found} {expected}, of up to {largest}");
    }
}

fn agree<E: Element>(gpu: &Gpu) {
    let (spans, runs) = lay_out(&SPANS);
    let rows = Keys::new(&spans).rows();
    // In bf16 both sides round weights, slopes, and what comes out of `unprepare`, each by up to 2^-9. The CPU takes the
    // slopes' mean from f32, a GPU from the attention's result, rounded by 2^-9 once more. That makes 4 x 2^-9 at most
    // of the terms of a sum, whose errors are of either sign: 0.7% of the largest were seen.
    let tolerance = if size_of::<E>() == 2 { 1e-2 } else { 1e-5 };
    for case in CASES {
        let (qkv, d_out) = (case.qkv::<E>(rows), case.d_out::<E>(rows));
        let found = on_gpu(gpu, case, &spans, &runs, &qkv, &d_out);
        let expected = on_cpu(case, &spans, &runs, &qkv, &d_out);
        let ends = [0, case.heads, case.heads + case.kv_heads, case.heads + 2 * case.kv_heads];
        for (part, ends) in ["q", "k", "v"].into_iter().zip(ends.windows(2)) {
            let of_part = |x: &[f32]| -> Vec<f32> {
                let rows = x.chunks_exact(case.width());
                rows.flat_map(|row| row[ends[0] * case.dim..ends[1] * case.dim].to_vec()).collect()
            };
            let what = format!("{case:?} {part}");
            assert_near(&of_part(&found.dqkv), &of_part(&expected.dqkv), tolerance, &what);
            let [found, expected] = [&found, &expected].map(|x| of_part(&widened(&x.unprepared)));
            assert_near(&found, &expected, tolerance, &format!("{what}, unprepared"));
        }
        for (found, expected) in found.norms.iter().zip(&expected.norms) {
            assert_near(found, expected, tolerance, &format!("{case:?} norm"));
        }
    }
}

#[test]
fn attention_has_the_gradients_of_the_cpu() {
    on_each(|gpu| {
        agree::<f32>(gpu);
        agree::<bf16>(gpu);
    });
}

fn alone_and_together<E: Element>(gpu: &Gpu, case: Case) {
    let (spans, cut) = lay_out(&SPANS);
    let rows = Keys::new(&spans).rows();
    let (width, attended) = (case.width(), case.heads * case.dim);
    let (qkv, d_out) = (case.qkv::<E>(rows), case.d_out::<E>(rows));
    let together = on_gpu(gpu, case, &spans, &cut, &qkv, &d_out);
    for first_page in [7, 1, 8] {
        let own: Vec<_> = spans.iter().filter(|span| span.pages[0] == first_page).collect();
        let rows_of = |x: &[E], width: usize| -> Vec<E> {
            own.iter().flat_map(|span| x[span.row * width..(span.row + span.len) * width].to_vec()).collect()
        };
        let alone: Vec<_> = own.iter().map(|span| (span.position, span.len, span.pages)).collect();
        let (alone, cut) = lay_out(&alone);
        let alone = on_gpu(gpu, case, &alone, &cut, &rows_of(&qkv, width), &rows_of(&d_out, attended));
        assert!(alone.unprepared == rows_of(&together.unprepared, width), "{case:?}: the tree of page {first_page}");
    }
}

#[test]
fn gradients_of_attention_have_the_same_bits_whatever_stands_beside_them() {
    on_each(|gpu| {
        alone_and_together::<f32>(gpu, Case { window: Some(50), q_norm: true, ..CASE });
        alone_and_together::<bf16>(gpu, Case { heads: 3, kv_heads: 1, ..CASE });
    });
}
