//! Attention whose keys are cut into chunks, over beginnings that sequences share or have each for themselves.

use super::*;

/// Sequences behind a common beginning. The last has rows of its own that are no numbers; its results are not looked at.
struct Family<E> {
    case: Case,
    /// Positions that are common.
    shared: usize,
    /// Rows of each at the end whose results are wanted.
    wanted: usize,
    sequences: Vec<Vec<E>>,
}

/// Rows of a sequence of a family, by their positions; or of one whose rows are no numbers.
#[derive(Clone, Debug)]
enum Part {
    Of(usize, std::ops::Range<usize>),
    Neighbour(std::ops::Range<usize>),
}

/// Of each sequence but the last: results of the wanted rows, and logarithms of their sums.
type Found<E> = Vec<(Vec<E>, Vec<f32>)>;

impl<E: Element> Family<E> {
    fn new(case: Case, shared: usize, wanted: usize) -> Self {
        let width = case.width();
        let common: Vec<E> = rounded(&numbers(shared * width, 5));
        let own = |seed| rounded::<E>(&numbers((case.tokens - shared) * width, seed));
        let mut sequences: Vec<Vec<E>> = (6..9).map(|seed| [&common[..], &own(seed)].concat()).collect();
        sequences[2][shared * width..].fill(E::from_f32(f32::NAN));
        Self { case, shared, wanted, sequences }
    }

    /// The sequences' pages, out of order, then those of the neighbour; the common ones in one copy, or in one for each.
    fn tables(&self, one_copy: bool) -> Vec<Vec<u32>> {
        let (pages, common) = (self.case.tokens.div_ceil(PAGE), self.shared / PAGE);
        let page = |i: usize, page: usize| {
            let common = one_copy && i < self.sequences.len() && page < common;
            ((if common { 1 } else { i + 1 }) * pages - 1 - page) as u32
        };
        (0..=self.sequences.len()).map(|i| (0..pages).map(|at| page(i, at)).collect()).collect()
    }

    /// Runs steps after everything before the wanted rows is there.
    fn run(
        &self,
        gpu: &Gpu,
        (invariant, partial_bytes, one_copy): (bool, usize, bool),
        steps: &[Vec<Part>],
    ) -> Found<E> {
        let Self { case, wanted, sequences, .. } = self;
        let tables = self.tables(one_copy);
        let mut attending = Attending::new(gpu, *case, tables.len() * tables[0].len());
        (attending.invariant, attending.partial_bytes) = (invariant, partial_bytes);
        let first = case.tokens - wanted;
        // What is in common is written once where there is one copy.
        let begin = |i| if i > 0 && one_copy { self.shared } else { 0 };
        let before: Vec<Part> = (0..sequences.len()).map(|i| Part::Of(i, begin(i)..first)).collect();
        self.prepare(&mut attending, &tables, &before);
        // Partial results that are no numbers are there before, of keys outside a window too.
        let q = self.prepare(&mut attending, &tables, &[Part::Neighbour(case.tokens - 1..case.tokens)]);
        attending.case.window = None;
        attending.attend(&q);
        attending.case.window = case.window;

        let out_width = case.heads * case.dim;
        let mut found = vec![(Vec::new(), Vec::new()); sequences.len()];
        for step in steps {
            let q = self.prepare(&mut attending, &tables, step);
            let (out, log_sums) = attending.attend(&q);
            let mut row = 0;
            for part in step {
                let (Part::Of(_, range) | Part::Neighbour(range)) = part;
                let end = row + range.len();
                if let Part::Of(i, range) = part {
                    assert_eq!(range.start, first + found[*i].1.len() / case.heads, "rows in order");
                    found[*i].0.extend_from_slice(&out[row * out_width..end * out_width]);
                    found[*i].1.extend_from_slice(&log_sums[row * case.heads..end * case.heads]);
                }
                row = end;
            }
        }
        found.pop();
        assert!(found.iter().all(|(_, sums)| sums.len() == wanted * case.heads), "all wanted rows");
        found
    }

    fn prepare(&self, attending: &mut Attending<'_, E>, tables: &[Vec<u32>], parts: &[Part]) -> gpu::Buffer<E> {
        let width = self.case.width();
        let (mut qkv, mut spans, mut cut) = (Vec::new(), Vec::new(), Vec::new());
        for part in parts {
            let row = qkv.len() / width;
            let (range, pages) = match part {
                Part::Of(i, range) => {
                    qkv.extend_from_slice(&self.sequences[*i][range.start * width..range.end * width]);
                    (range, &tables[*i])
                }
                Part::Neighbour(range) => {
                    qkv.resize(qkv.len() + range.len() * width, E::from_f32(f32::NAN));
                    (range, &tables[self.sequences.len()])
                }
            };
            spans.push(Span { row, len: range.len(), position: range.start, pages });
            cut.extend(runs(row, range.start, range.len(), pages));
        }
        attending.prepare(&qkv, &spans, &cut)
    }

    fn check(&self, found: &Found<E>) {
        let (case, tolerance) = (self.case, if size_of::<E>() == 2 { 0.02 } else { 1e-5 });
        for (sequence, (out, log_sums)) in self.sequences.iter().zip(found) {
            let qkv = widened(sequence);
            let expected = expected_of_last(case, &qkv, self.wanted);
            for (i, (found, expected)) in out.iter().zip(&expected).enumerate() {
                let found = found.to_f32();
                assert!((found - expected).abs() <= tolerance, "{case:?} {i}: {found} {expected}");
            }
            for (i, (found, expected)) in log_sums.iter().zip(self.expected_log_sums(&qkv)).enumerate() {
                assert!((found - expected).abs() <= tolerance * 2.0, "{case:?} {i}: {found} {expected}");
            }
        }
    }

    /// Logarithms of the sums of `exp(score)` over the keys that each wanted row and head sees.
    fn expected_log_sums(&self, qkv: &[f32]) -> Vec<f32> {
        let (case, rule) = (self.case, self.case.rule());
        let (dim, group, rotary) = (case.dim, case.heads / case.kv_heads, case.rotary());
        let head = |position: usize, index: usize| {
            let mut head = qkv[position * case.width() + index * dim..][..dim].to_vec();
            if case.normed {
                head = reference::rms_norm(&head, &case.norm(index < case.heads), 1e-6);
            }
            rotary.apply(position, &mut head);
            head
        };
        let keys: Vec<Vec<Vec<f32>>> = (0..case.kv_heads)
            .map(|kv_head| (0..case.tokens).map(|position| head(position, case.heads + kv_head)).collect())
            .collect();
        let rows = (case.tokens - self.wanted..case.tokens).flat_map(|row| (0..case.heads).map(move |h| (row, h)));
        let log_sum = |(position, h): (usize, usize)| {
            let q = head(position, h);
            let first = case.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let score = |k: &Vec<f32>| {
                let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                let score = dot * f64::from(rule.scale);
                case.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let sum: f64 = keys[h / group][first..=position].iter().map(|k| score(k).exp()).sum();
            sum.ln() as f32
        };
        rows.map(log_sum).collect()
    }
}

#[track_caller]
fn assert_same_bits<E: Element>(found: &Found<E>, expected: &Found<E>, what: &str) {
    let bits = |found: &Found<E>| -> Vec<u32> {
        let all = found.iter().flat_map(|(out, sums)| widened(out).into_iter().chain(sums.iter().copied()));
        all.map(f32::to_bits).collect()
    };
    assert!(bits(found) == bits(expected), "other bits {what}");
}

fn few_rows<E: Element>(gpu: &Gpu) {
    for case in CASES {
        let case = Case { tokens: 512 + 37, ..case };
        // What is half a block's, and no more.
        let wanted = (32 / (case.heads / case.kv_heads)).min(5);
        let family = Family::<E>::new(case, 512, wanted);
        let rows = case.tokens - wanted..case.tokens;
        let of = |i| Part::Of(i, rows.clone());
        let neighbour = || Part::Neighbour(0..70);
        let how = (false, gpu::PARTIAL_BYTES, true);
        let alone = family.run(gpu, how, &[vec![of(0)], vec![of(1)]]);
        family.check(&alone);
        let together = [vec![of(2), neighbour(), of(0), of(1)]];
        assert_same_bits(&family.run(gpu, how, &together), &alone, &format!("in one copy: {case:?}"));
        let how = (false, 0, false);
        assert_same_bits(&family.run(gpu, how, &together), &alone, &format!("in copies: {case:?}"));
    }
}

#[test]
fn few_rows_attend_in_chunks_with_the_same_bits_whatever_stands_beside_them() {
    on_each(|gpu| {
        few_rows::<f32>(gpu);
        few_rows::<bf16>(gpu);
    });
}

fn invariant<E: Element>(gpu: &Gpu) {
    for case in CASES {
        // With a page in common that is in no whole chunk.
        let case = Case { tokens: 1024 + 48, ..case };
        let (family, first) = (Family::<E>::new(case, 1024 + 32, 10), 1024 + 38);
        let of = |i, from: usize, to: usize| Part::Of(i, first + from..first + to);
        let how = (true, gpu::PARTIAL_BYTES, true);
        let alone = family.run(gpu, how, &[vec![of(0, 0, 10)], vec![of(1, 0, 10)]]);
        family.check(&alone);
        let steps = [
            vec![of(2, 0, 3), of(0, 0, 1), Part::Neighbour(1030..1033), of(1, 0, 7)],
            vec![of(1, 7, 10), of(2, 3, 4), of(0, 1, 10)],
        ];
        assert_same_bits(&family.run(gpu, how, &steps), &alone, &format!("in one copy: {case:?}"));
        let how = (true, 0, false);
        assert_same_bits(&family.run(gpu, how, &steps), &alone, &format!("in copies: {case:?}"));
    }
}

#[test]
fn invariant_attention_has_the_same_bits_however_a_sequence_is_cut_into_steps() {
    on_each(|gpu| {
        invariant::<f32>(gpu);
        invariant::<bf16>(gpu);
    });
}

#[test]
fn invariant_attention_has_the_same_bits_in_one_step() {
    on_each(|gpu| {
        let case = Case { heads: 2, kv_heads: 1, tokens: 1024 + 40, ..CASE };
        // All rows of the first, without a beginning that is there before.
        let family = Family::<bf16>::new(case, 0, case.tokens);
        let how = (true, gpu::PARTIAL_BYTES, true);
        let all = |i| Part::Of(i, 0..case.tokens);
        let whole = family.run(gpu, how, &[vec![all(0), all(1)]]);
        family.check(&whole);
        let of = |i, from: usize, to: usize| Part::Of(i, from..to);
        let steps = [
            vec![of(0, 0, 1000), of(1, 0, 1030)],
            vec![of(1, 1030, 1031), of(0, 1000, 1040)],
            vec![of(0, 1040, 1064), of(1, 1031, 1064)],
        ];
        assert_same_bits(&family.run(gpu, how, &steps), &whole, "in steps");
    });
}

#[test]
fn partial_results_that_come_in_rounds_are_the_same() {
    on_each(|gpu| {
        let case = Case { heads: 20, kv_heads: 1, dim: 8, rotated: 4, tokens: 1024 + 60, ..CASE };
        let family = Family::<f32>::new(case, 1024, 36);
        // Two for each of 108 rows, where the least that there may be are 32 for each of 3.
        let step = [(0..3).map(|i| Part::Of(i, 1024 + 24..1024 + 60)).collect()];
        let at_once = family.run(gpu, (true, gpu::PARTIAL_BYTES, true), &step);
        family.check(&at_once);
        assert_same_bits(&family.run(gpu, (true, 0, true), &step), &at_once, "in rounds");
    });
}
