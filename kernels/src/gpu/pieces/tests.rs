//! What every cut has to fulfil, and how many blocks some steps take.

use std::ops::Range;

use proptest::prelude::*;

use super::*;

/// Rows of a block.
const ROWS: usize = 64;

const RULE: CutRule = CutRule { heads: 32, kv_heads: 8, head_dim: 128, invariant: false, partial_bytes: PARTIAL_BYTES };

/// A sequence of a step: its pages, its position and its rows.
type Sequence = (Vec<u32>, usize, usize);

fn cut(rule: CutRule, sequences: &[Sequence]) -> Cut {
    let (spans, positions) = lay_out(sequences);
    rule.cut(ROWS / (rule.heads / rule.kv_heads), &spans, &positions)
}

fn lay_out(sequences: &[Sequence]) -> (Vec<Span<'_>>, Vec<u32>) {
    let (mut spans, mut positions) = (Vec::new(), Vec::new());
    for (pages, position, len) in sequences {
        spans.push(Span { row: positions.len(), len: *len, position: *position, pages });
        positions.extend((*position..position + len).map(|position| position as u32));
    }
    (spans, positions)
}

/// So many sequences of `len` rows behind `shared` positions that they have in common.
fn family(count: usize, shared: usize, len: usize) -> Vec<Sequence> {
    let (common, own) = ((shared / PAGE) as u32, len.div_ceil(PAGE) as u32);
    let pages = |i| (0..common).chain(common + i * own..common + (i + 1) * own).collect();
    (0..count as u32).map(|i| (pages(i), shared, len)).collect()
}

/// Checks a cut, and answers the ranges of keys of every row.
fn ranges(rule: CutRule, sequences: &[Sequence], cut: &Cut) -> Vec<Vec<Range<usize>>> {
    let (spans, positions) = lay_out(sequences);
    let span = |row: usize| spans.iter().rfind(|span| span.row <= row).unwrap();
    let most = ROWS / (rule.heads / rule.kv_heads);
    let mut found = vec![Vec::new(); positions.len()];
    let (mut pieces, mut merges) = (&cut.pieces[..], &cut.merges[..]);
    for round in &cut.rounds {
        let (of_round, later) = pieces.split_at(round.pieces);
        let (merged, later_merges) = merges.split_at(round.merges);
        (pieces, merges) = (later, later_merges);
        let mut slots = vec![None; cut.slots];
        for piece in of_round {
            let rows = &cut.rows[piece.first as usize..][..piece.rows as usize];
            assert!((1..=most).contains(&rows.len()) && piece.from % 64 == 0);
            assert_eq!(Some(piece.position), rows.iter().map(|row| positions[row.row as usize]).min());
            let keys = piece.from as usize..piece.to as usize;
            let pages = keys.start / PAGE..keys.end.div_ceil(PAGE);
            for row in rows {
                let (span, position) = (span(row.row as usize), positions[row.row as usize] as usize);
                assert_eq!(cut.pages[piece.pages as usize..][pages.clone()], span.pages[pages.clone()]);
                assert!(keys.end <= span.position + span.len);
                if row.slot == WHOLE {
                    assert!(keys.start == 0 && keys.end > position && found[row.row as usize].is_empty());
                    found[row.row as usize].push(keys.clone());
                } else {
                    assert!(slots[row.slot as usize].replace((row.row, keys.clone())).is_none(), "a slot of two");
                }
            }
        }
        for merge in merged {
            let parts = &slots[merge.slot as usize..][..merge.count as usize];
            let parts: Vec<_> = parts.iter().map(|part| part.clone().unwrap()).collect();
            assert!((2..=MOST_CHUNKS).contains(&parts.len()) && parts.iter().all(|(row, _)| *row == merge.row));
            assert!(found[merge.row as usize].is_empty());
            found[merge.row as usize] = parts.into_iter().map(|(_, keys)| keys).collect();
        }
        let taken = slots.iter().flatten().count();
        assert_eq!(taken, merged.iter().map(|merge| merge.count as usize).sum::<usize>(), "some are not merged");
    }
    assert!(pieces.is_empty() && merges.is_empty() && cut.slots <= rule.slots(most));
    for (ranges, position) in found.iter().zip(&positions) {
        let position = *position as usize;
        assert!(ranges[0].start == 0 && ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        let (last, before) = ranges.split_last().unwrap();
        assert!(last.contains(&position), "{ranges:?} at {position}");
        assert!(before.iter().all(|keys| keys.end <= position), "{ranges:?} at {position}");
    }
    found
}

fn starts(ranges: &[Range<usize>]) -> Vec<usize> {
    ranges.iter().map(|keys| keys.start).collect()
}

/// Some prompts, each with sequences that share some of its pages; also where chunks grow.
fn steps() -> impl Strategy<Value = Vec<Sequence>> {
    let sequence = (0..40usize, 0..700usize, 1..70usize);
    let prompt = (prop::sample::select(vec![0, 8192, 32_768]), prop::collection::vec(sequence, 1..6));
    prop::collection::vec(prompt, 1..4).prop_map(|prompts| {
        let mut next = 10_000;
        let mut sequences = Vec::new();
        for (prompt, (beginning, members)) in prompts.into_iter().enumerate() {
            for (shared, more, len) in members {
                let shared = (beginning / PAGE + shared).saturating_sub(20);
                let position = shared * PAGE + more;
                let own = (position + len).div_ceil(PAGE) - shared;
                let common = (0..shared as u32).map(|page| 2000 * prompt as u32 + page);
                sequences.push((common.chain(next..next + own as u32).collect(), position, len));
                next += own as u32;
            }
        }
        sequences
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_row_has_all_its_keys_once_whatever_stands_beside_it(
        sequences in steps(),
        (heads, kv_heads) in prop::sample::select(vec![(4, 4), (32, 8), (20, 1), (64, 1)]),
        invariant: bool,
        partial_bytes in prop::sample::select(vec![0, 1 << 20, PARTIAL_BYTES]),
    ) {
        let rule = CutRule { heads, kv_heads, invariant, partial_bytes, ..RULE };
        let together = ranges(rule, &sequences, &cut(rule, &sequences));
        let mut row = 0;
        for (pages, position, len) in sequences {
            let alone = [(pages.clone(), position, len)];
            prop_assert_eq!(&together[row..row + len], &ranges(rule, &alone, &cut(rule, &alone))[..]);
            for i in (0..len).step_by(9).filter(|_| invariant) {
                let alone = [(pages.clone(), position + i, 1)];
                let alone = ranges(rule, &alone, &cut(rule, &alone));
                prop_assert_eq!(starts(&together[row + i]), starts(&alone[0]));
            }
            row += len;
        }
    }
}

#[test]
fn chunks_grow_with_rows_and_with_the_sequence() {
    let invariant = CutRule { invariant: true, ..RULE };
    for (rule, len, end, expected) in [
        (RULE, 1, 1, Some(256)),
        (RULE, 8, 8192, Some(256)),
        (RULE, 8, 8193, Some(512)),
        (RULE, 1, 100_000, Some(4096)),
        (RULE, 9, 8193, Some(1024)),
        (RULE, 64, 32_769, Some(2048)),
        (RULE, 65, 32_769, None),
        (invariant, 40_000, 70_000, Some(4096)),
        (invariant, 1, 1, Some(1024)),
        (invariant, 5000, 32_768, Some(1024)),
        (invariant, 5000, 32_769, Some(2048)),
        (invariant, 1, 1 << 20, Some(32 << 10)),
    ] {
        assert_eq!(rule.chunk(len, end, end - 1), expected, "{rule:?} {len} {end}");
    }
}

#[test]
fn sequences_with_a_common_beginning_share_blocks_where_that_saves_some() {
    // The number of blocks for a key head, and of rows that are merged.
    let blocks = |rule, sequences: &[Sequence]| {
        let cut = cut(rule, sequences);
        ranges(rule, sequences, &cut);
        (cut.pieces.len(), cut.merges.len())
    };
    let invariant = CutRule { invariant: true, ..RULE };
    // Samples of one prompt, a block for each chunk of it; and with nothing in common.
    assert_eq!(blocks(RULE, &family(16, 2048, 1)), (8 + 16, 16));
    assert_eq!(blocks(invariant, &family(16, 2048, 1)), (2 + 16, 16));
    let apart: Vec<Sequence> = (0..16).map(|i| ((100 * i..100 * i + 65).collect(), 2048, 1)).collect();
    assert_eq!(blocks(RULE, &apart), (16 * 9, 16));
    // Short candidates: 320 rows are 20 blocks.
    assert_eq!(blocks(RULE, &family(64, 2048, 5)), (8 * 20 + 64, 320));
    // Candidates that fill their blocks gain nothing.
    assert_eq!(blocks(RULE, &family(16, 2048, 256)), (16 * 16, 0));
    assert_eq!(blocks(invariant, &family(16, 2048, 256)), (16 * 16 * 3, 16 * 256));
    // A prompt is attended to as it always was, and if invariant as long as it is one chunk.
    assert_eq!(blocks(RULE, &family(1, 0, 4096)), (256, 0));
    assert_eq!(blocks(invariant, &family(1, 0, 1024)), (64, 0));
    assert_eq!(blocks(invariant, &family(1, 0, 2048)), (64 + 2 * 64, 1024));
}

#[test]
fn partial_results_are_bounded() {
    let one = RULE.slot_bytes();
    assert_eq!(one, 32 * (128 + 1) * 4);
    assert_eq!(Partials::most_bytes(RULE, 1000, 256), 0);
    assert_eq!(Partials::most_bytes(RULE, 3, 1000), (3 * 4usize).next_power_of_two() * one);
    assert_eq!(Partials::most_bytes(RULE, 1 << 20, 1 << 20), PARTIAL_BYTES / one * one);
    // What a block's rows may need is there in any case.
    let least = CutRule { partial_bytes: 0, ..RULE };
    assert_eq!(Partials::most_bytes(least, 1 << 20, 1 << 20), 32 * 32 * one);
    let sequences = family(40, 8000, 1);
    let cut = cut(least, &sequences);
    ranges(least, &sequences, &cut);
    assert_eq!((cut.slots, cut.rounds.len()), (512, 3));
}

#[test]
fn steps_that_differ_by_little_have_one_shape() {
    let shape = |sequences: &[Sequence]| {
        let mut cut = cut(RULE, sequences);
        cut.fill_up(RULE.slots(ROWS / 4));
        assert!(cut.pieces.len() >= cut.rounds[0].pieces && cut.merges.len() == cut.rounds[0].merges);
        (cut.rounds[0], cut.slots)
    };
    let streams = |position: &dyn Fn(u32) -> usize| -> Vec<Sequence> {
        (0..16).map(|i| ((i * 40..(i + 1) * 40).collect(), position(i), 1)).collect()
    };
    // Sixteen streams, a token later, and when some have come to another chunk.
    let before = shape(&streams(&|_| 700));
    assert_eq!((before.0.merges, before.1), (16, 64));
    assert_eq!(shape(&streams(&|_| 701)), before);
    assert_eq!(shape(&streams(&|i| 767 + i as usize / 8)), before);
}
