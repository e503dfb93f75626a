//! Quantised weights against what they are when they are expanded.

use half::{bf16, f16};
use plumb_kernels::gpu::{self, Gpu, Room};
use plumb_kernels::linear::{Matrix, Rows};
use plumb_kernels::quantised::{Described, QuantRows, Scales};
use plumb_kernels::reference;

use super::{assert_close, assert_within, numbers, on_each, rounded, widened};

/// Those of GGUF, from Q4_0 to Q8_0 and from Q2_K to Q6_K: inputs that share a scale, groups that share a factor, the least
/// code, bits, and whether there are offsets.
const FORMATS: [Described; 10] = [
    described(32, 1, -8, 4, false),
    described(32, 1, 0, 4, true),
    described(32, 1, -16, 5, false),
    described(32, 1, 0, 5, true),
    described(32, 1, -128, 8, false),
    described(16, 16, 0, 2, true),
    described(16, 16, -4, 3, false),
    described(32, 8, 0, 4, true),
    described(32, 8, 0, 5, true),
    described(16, 16, -32, 6, false),
];

const fn described(group: usize, block: usize, least: i8, bits: u32, offsets: bool) -> Described {
    Described { group, block, least, bits, offsets }
}

/// Numbers without a pattern that a layout could share.
fn noise(seed: u64) -> impl Iterator<Item = u32> {
    let next =
        |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    std::iter::successors(Some(seed + 1), next).skip(1).map(|state| (state >> 33) as u32)
}

fn quantised(described: Described, rows: usize, inputs: usize) -> QuantRows {
    let Described { group, block, least, bits, offsets } = described;
    let groups = rows * inputs / group;
    let scales = |seed| Scales {
        factors: noise(seed).take(groups / block).map(|n| f16::from_f32(n as f32 / 2f32.powi(31) - 0.5)).collect(),
        integers: noise(seed + 1).take(if block > 1 { groups } else { 0 }).map(|n| (n % 127) as i8 - 63).collect(),
    };
    QuantRows {
        inputs,
        described,
        codes: noise(3).take(rows * inputs).map(|n| (i32::from(least) + (n % (1 << bits)) as i32) as i8).collect(),
        scales: scales(4),
        offsets: if offsets { scales(6) } else { Scales::default() },
    }
}

fn part<E>(rows: &QuantRows) -> Matrix<'_, E> {
    Matrix { weights: Rows::Quantised(rows), bias: None }
}

/// Inputs that a matrix of this description may have, beside so many.
fn inputs_of(described: Described, units: usize) -> usize {
    if described.block == 1 { 32 * units } else { 256 * units.div_ceil(8) }
}

/// Rows that are 0 but for a 1 pick weights one by one.
fn weights<E: gpu::Output<E>>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    for described in FORMATS {
        let (inputs, outputs) = (inputs_of(described, 3), 37);
        let rows = quantised(described, outputs, inputs);
        let layer = gpu::Linear::stacked(gpu, &[part::<E>(&rows)], inputs, &Room::new(gpu)).unwrap();
        let expected = rows.expand::<E>();
        // Eight, 32 and more take different ways.
        for at_once in [7, 32, 75] {
            for first in (0..inputs).step_by(at_once) {
                let ones = first..(first + at_once).min(inputs);
                let x: Vec<E> = ones
                    .clone()
                    .flat_map(|one| (0..inputs).map(move |i| E::from_f32(if i == one { 1.0 } else { 0.0 })))
                    .collect();
                let mut y = gpu.zeros::<E>(ones.len() * outputs).unwrap();
                layer.forward(gpu, gpu.upload(&x).unwrap().all(), y.all_mut()).unwrap();
                let found = y.to_vec().unwrap();
                for (row, one) in ones.enumerate() {
                    for output in 0..outputs {
                        let (found, expected) = (found[row * outputs + output], expected[output * inputs + one]);
                        let (found, expected) = (found.to_f32() + 0.0, expected.to_f32() + 0.0);
                        assert!(found == expected, "{described:?} {output} {one}: {found} {expected}");
                    }
                }
            }
        }
        let ids = [36u32, 0, 17, 17];
        let mut x = gpu.zeros::<f32>(ids.len() * inputs).unwrap();
        layer.embed(gpu, gpu.upload(&ids).unwrap().all(), 3.0, x.all_mut()).unwrap();
        let rows =
            ids.iter().flat_map(|id| expected[*id as usize * inputs..][..inputs].iter().map(|w| w.to_f32() * 3.0));
        assert_eq!(x.to_vec().unwrap(), rows.collect::<Vec<_>>(), "{described:?}");
    }
}

#[test]
fn quantised_weights_are_the_expanded_ones_to_the_bit() {
    on_each(|gpu| {
        weights::<f32>(gpu);
        weights::<bf16>(gpu);
    });
}

fn products<E: gpu::Output<E>>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    // More units of 32 inputs than all warps of a block take at a time, and fewer than one does.
    for (i, described) in FORMATS.into_iter().enumerate() {
        for (rows, units, outputs) in [(1, 73, 16), (9, 1, 40), (33 + i, 5, 7)] {
            let inputs = inputs_of(described, units);
            let quantised = quantised(described, outputs, inputs);
            let w = widened(&quantised.expand::<E>());
            let x: Vec<E> = rounded(&numbers(rows * inputs, 1));
            // What a sum may lose goes by what it adds up.
            let sizes = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
            let largest =
                reference::linear(&sizes(&widened(&x)), &sizes(&w), None, inputs).into_iter().fold(0.0, f32::max);
            let within = |found: &[f32], expected: &[f32], what: &str| {
                let scaled = |values: &[f32]| values.iter().map(|value| value / largest).collect::<Vec<_>>();
                assert_within(&scaled(found), &scaled(expected), 1e-5, what);
            };
            let bias = numbers(outputs, 3);
            let part = Matrix { bias: Some(&bias[..]), ..part(&quantised) };
            let layer = gpu::Linear::stacked(gpu, &[part], inputs, &Room::new(gpu)).unwrap();
            let what = format!("{described:?}: {rows} x {inputs} x {outputs}");
            let expected = reference::linear(&widened(&x), &w, Some(&bias), inputs);
            let gpu_x = gpu.upload(&x).unwrap();
            let mut y = gpu.zeros::<f32>(rows * outputs).unwrap();
            layer.forward(gpu, gpu_x.all(), y.all_mut()).unwrap();
            within(&y.to_vec().unwrap(), &expected, &what);
            layer.add_to(gpu, gpu_x.all(), y.all_mut()).unwrap();
            within(&y.to_vec().unwrap(), &expected.iter().map(|y| 2.0 * y).collect::<Vec<_>>(), &what);
            let narrow_bias = widened(&rounded::<E>(&bias));
            let expected = reference::linear(&widened(&x), &w, Some(&narrow_bias), inputs);
            let mut y = gpu.zeros::<E>(rows * outputs).unwrap();
            layer.forward(gpu, gpu_x.all(), y.all_mut()).unwrap();
            let expected: Vec<f32> = expected.iter().map(|y| y / largest).collect();
            let found: Vec<f32> = y.to_vec().unwrap().iter().map(|y| y.to_f32() / largest).collect();
            assert_close(&rounded::<E>(&found), &expected, &what);
        }
    }
}

#[test]
fn products_with_quantised_weights_are_those_of_the_reference() {
    on_each(|gpu| {
        products::<f32>(gpu);
        products::<bf16>(gpu);
    });
}

fn stacks<E: gpu::Output<E>>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    let inputs = 256;
    let [q4, q6, q8] = [(7, 24), (9, 40), (4, 17)].map(|(format, rows)| quantised(FORMATS[format], rows, inputs));
    let plain: Vec<E> = rounded(&numbers(30 * inputs, 2));
    let bias = numbers(30, 3);
    let plain = Matrix { weights: Rows::Plain(&plain), bias: Some(&bias[..]) };
    let parts = [part(&q4), part(&q4), part(&q6), plain, plain, part(&q8)];
    let room = Room::new(gpu);
    let layer = gpu::Linear::stacked(gpu, &parts, inputs, &room).unwrap();
    let expanded: Vec<Vec<E>> = parts
        .iter()
        .map(|part| match part.weights {
            Rows::Plain(rows) => rows.to_vec(),
            Rows::Quantised(rows) => rows.expand(),
            Rows::Fp8(rows) => rows.expand(),
        })
        .collect();
    let of_one_kind: Vec<Matrix<'_, E>> = parts
        .iter()
        .zip(&expanded)
        .map(|(part, rows)| Matrix { weights: Rows::Plain(rows), bias: part.bias })
        .collect();
    let expected = gpu::Linear::stacked(gpu, &of_one_kind, inputs, &room).unwrap();
    let outputs = 24 + 24 + 40 + 30 + 30 + 17;
    assert_eq!((layer.outputs(), expected.outputs()), (outputs, outputs));
    let of = |part: &Matrix<'_, E>| {
        let outputs = match part.weights {
            Rows::Plain(rows) => rows.len() / inputs,
            Rows::Quantised(rows) => rows.rows(),
            Rows::Fp8(rows) => rows.rows(),
        };
        (outputs, part.weights.held())
    };
    let [bytes, room_bytes] = gpu::stacked_bytes::<E>(&parts.each_ref().map(of), inputs);
    assert_eq!(layer.bytes(), bytes + outputs * (size_of::<f32>() + size_of::<E>()));
    assert_eq!(room_bytes, 48 * inputs * size_of::<E>());
    for rows in [2, 50] {
        let x = gpu.upload(&rounded::<E>(&numbers(rows * inputs, 1))).unwrap();
        // From within the second run of outputs to within the last.
        for (first, count) in [(0, outputs), (48, outputs - 48), (64, 60), (80, 8), (118, 20)] {
            let mut found = gpu.zeros::<f32>(rows * count).unwrap();
            let mut wanted = gpu.zeros::<f32>(rows * count).unwrap();
            layer.part(gpu, first, count, x.all(), found.all_mut()).unwrap();
            expected.part(gpu, first, count, x.all(), wanted.all_mut()).unwrap();
            let scaled = |y: gpu::Buffer<f32>| y.to_vec().unwrap().iter().map(|y| y / 256.0).collect::<Vec<_>>();
            assert_within(
                &scaled(found),
                &scaled(wanted),
                1e-4,
                &format!("{rows} rows, {count} outputs from {first} on"),
            );
        }
    }
}

#[test]
fn matrices_on_top_of_one_another_are_held_each_in_its_own_way() {
    on_each(|gpu| {
        stacks::<f32>(gpu);
        stacks::<bf16>(gpu);
    });
}

/// A matrix that is larger than what is expanded at a time, 64 MiB.
#[test]
fn a_large_matrix_is_expanded_in_parts() {
    on_each(|gpu| {
        let (rows, inputs, outputs) = (33, 1056, 16_416);
        let quantised = quantised(FORMATS[0], outputs, inputs);
        let before = gpu.memory().unwrap().free;
        let layer = gpu::Linear::stacked(gpu, &[part::<f32>(&quantised)], inputs, &Room::new(gpu)).unwrap();
        #[cfg(not(feature = "cuda"))]
        assert_eq!(
            before - gpu.memory().unwrap().free,
            layer.bytes() + ((64 << 20) / 4 / inputs / 16 * 16) * inputs * 4
        );
        assert!(gpu.memory().unwrap().free < before);
        let x = numbers(rows * inputs, 1);
        let mut y = gpu.zeros::<f32>(rows * outputs).unwrap();
        layer.forward(gpu, gpu.upload(&x).unwrap().all(), y.all_mut()).unwrap();
        let found = y.to_vec().unwrap();
        for output in [0, 1, 15_871, 15_872, 15_887, 15_888, 15_889, 16_415] {
            let w = quantised.select([output].into_iter()).expand::<f32>();
            let expected = reference::linear(&x, &w, None, inputs);
            let found: Vec<f32> = (0..rows).map(|row| found[row * outputs + output]).collect();
            assert_within(&found, &expected, 1e-3, &format!("output {output}"));
        }
    });
}

#[test]
fn what_there_is_no_kernel_for_is_refused() {
    on_each(|gpu| {
        for described in [described(32, 1, -8, 6, false), described(16, 1, -8, 4, false)] {
            let rows = quantised(described, 3, 64);
            let refused = gpu::Linear::stacked(gpu, &[part::<f32>(&rows)], 64, &Room::new(gpu));
            assert!(refused.is_err_and(|error| error.to_string().contains("no kernels")), "{described:?}");
        }
    });
}

fn invariant<E: gpu::Output<E>>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    let gpu = &gpu.clone().invariant();
    let (inputs, outputs, most) = (512, 24, 100);
    let quantised = quantised(FORMATS[7], outputs, inputs);
    let layer = gpu::Linear::stacked(gpu, &[part::<E>(&quantised)], inputs, &Room::new(gpu)).unwrap();
    let x = gpu.upload(&rounded::<E>(&numbers(most * inputs, 2))).unwrap();
    let rows = |rows: std::ops::Range<usize>| {
        let mut y = gpu.zeros::<f32>(rows.len() * outputs).unwrap();
        layer.forward(gpu, x.view(rows.start * inputs..rows.end * inputs), y.all_mut()).unwrap();
        y.to_vec().unwrap()
    };
    let all = rows(0..most);
    for part in [0..1, 1..4, 8..24, 3..67] {
        assert_eq!(rows(part.clone()), all[part.start * outputs..part.end * outputs], "{part:?}");
    }
}

#[test]
fn with_quantised_weights_an_invariant_gpu_computes_a_row_by_itself() {
    on_each(|gpu| {
        invariant::<f32>(gpu);
        invariant::<bf16>(gpu);
    });
}
