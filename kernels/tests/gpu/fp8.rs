//! Products of e4m3 against what the numbers are that they are made of.

use half::bf16;
use plumb_kernels::fp8::{self, Fp8Rows};
use plumb_kernels::gpu::{self, Gpu, GpuError, Room};
use plumb_kernels::linear::{Held, Matrix, Rows};
use plumb_kernels::reference;

use super::{assert_within, numbers, on_each, rounded, widened};

fn layer(gpu: &Gpu, rows: &Fp8Rows, bias: Option<&[f32]>) -> gpu::Result<gpu::Linear<bf16>> {
    let part = Matrix { weights: Rows::Fp8(rows), bias };
    gpu::Linear::stacked(gpu, &[part], rows.inputs, &Room::new(gpu))
}

/// Runs a test on each that multiplies e4m3.
fn on_each_with_fp8(test: impl Fn(&Gpu)) {
    on_each(|gpu| match layer(gpu, &Fp8Rows::quantise(&numbers(16 * 16, 1), 16), None) {
        Err(GpuError::Unsupported(reason)) => eprintln!("skipped: {reason}"),
        _ => test(gpu),
    });
}

/// What a layer makes of rows, in all the ways in which it can be asked; each is compared with what the rows' e4m3 make.
fn check(gpu: &Gpu, x: &[bf16], w: &Fp8Rows, bias: Option<&[f32]>) {
    let (rows, inputs, outputs) = (x.len() / w.inputs, w.inputs, w.rows());
    let what = format!("{rows} x {inputs} x {outputs}, bias: {}", bias.is_some());
    let layer = layer(gpu, w, bias).unwrap();
    assert_eq!((layer.inputs(), layer.outputs()), (inputs, outputs));
    let x8 = Fp8Rows::quantise(x, inputs).expand::<f32>();
    let narrow_bias = bias.map(|bias| widened(&rounded::<bf16>(bias)));
    let expected = reference::linear(&x8, &w.expand::<f32>(), narrow_bias.as_deref(), inputs);
    // What a sum may lose goes by what it adds up.
    let largest = expected.iter().fold(1.0, |largest: f32, y| largest.max(y.abs()));
    let scaled = |y: &[f32]| y.iter().map(|y| y / largest).collect::<Vec<_>>();
    let gpu_x = gpu.upload(x).unwrap();
    let mut y = gpu.zeros::<f32>(rows * outputs).unwrap();
    layer.forward(gpu, gpu_x.all(), y.all_mut()).unwrap();
    assert_within(&scaled(&y.to_vec().unwrap()), &scaled(&expected), 1e-4, &what);
    layer.add_to(gpu, gpu_x.all(), y.all_mut()).unwrap();
    let twice: Vec<f32> = expected.iter().map(|y| 2.0 * y).collect();
    assert_within(&scaled(&y.to_vec().unwrap()), &scaled(&twice), 1e-4, &what);
    let mut y = gpu.zeros::<bf16>(rows * outputs).unwrap();
    layer.forward(gpu, gpu_x.all(), y.all_mut()).unwrap();
    assert_within(&scaled(&widened(&y.to_vec().unwrap())), &scaled(&expected), 1.0 / 128.0, &what);
    if outputs > 16 {
        let mut part = gpu.zeros::<f32>(rows * 16).unwrap();
        layer.part(gpu, outputs - 16, 16, gpu_x.all(), part.all_mut()).unwrap();
        let last: Vec<f32> = expected.chunks_exact(outputs).flat_map(|row| row[outputs - 16..].to_vec()).collect();
        assert_within(&scaled(&part.to_vec().unwrap()), &scaled(&last), 1e-4, &what);
    }
}

#[test]
fn products_of_e4m3_are_those_of_the_reference() {
    on_each_with_fp8(|gpu| {
        for (rows, inputs, outputs) in [(1, 64, 16), (5, 1104, 48), (40, 256, 144)] {
            // Rows of quite different sizes.
            let size = |i: usize| 10f32.powi((i / inputs % 7) as i32 - 3);
            let x = numbers(rows * inputs, 1).iter().enumerate().map(|(i, x)| x * size(i)).collect::<Vec<_>>();
            let w = numbers(outputs * inputs, 2).iter().enumerate().map(|(i, w)| w * size(i)).collect::<Vec<_>>();
            let w = Fp8Rows::quantise(&w, inputs);
            check(gpu, &rounded(&x), &w, None);
            check(gpu, &rounded(&x), &w, Some(&numbers(outputs, 3)));
        }
    });
}

#[test]
fn more_rows_than_are_made_ready_at_a_time_are_multiplied_in_parts() {
    on_each_with_fp8(|gpu| {
        for (rows, outputs) in [(4100, 32), (1030, 16_384)] {
            let x: Vec<bf16> = rounded(&numbers(rows * 16, 1));
            check(gpu, &x, &Fp8Rows::quantise(&numbers(outputs * 16, 2), 16), None);
        }
    });
}

/// The numbers of e4m3, what lies between them and just beside that, in a row whose scale is 1: a weight of 1 for one of
/// them at a time shows what it has become.
#[test]
fn rows_become_the_nearest_numbers() {
    on_each_with_fp8(|gpu| {
        let mut x: Vec<f32> = Vec::new();
        for code in 0..0x7f_u8 {
            let number = fp8::to_f32(code);
            x.extend([number, -number]);
            if number == fp8::MAX {
                break;
            }
            let middle = f32::midpoint(number, fp8::to_f32(code + 1));
            // One bit of bf16 less and more.
            let beside = |bits: i32| f32::from_bits((middle.to_bits() as i32 + (bits << 16)).max(0) as u32);
            x.extend([middle, -middle, beside(-1), beside(1)]);
        }
        x.resize(x.len().next_multiple_of(16), 0.0);
        let inputs = x.len();
        let ones: Vec<f32> = (0..inputs * inputs).map(|i| if i / inputs == i % inputs { 1.0 } else { 0.0 }).collect();
        let w = Fp8Rows { scales: vec![1.0; inputs], codes: ones.iter().map(|x| fp8::from_f32(*x)).collect(), inputs };
        let mut y = gpu.zeros::<f32>(inputs).unwrap();
        let x: Vec<bf16> = rounded(&x);
        layer(gpu, &w, None).unwrap().forward(gpu, gpu.upload(&x).unwrap().all(), y.all_mut()).unwrap();
        for (x, found) in x.iter().zip(y.to_vec().unwrap()) {
            assert_eq!(found, fp8::to_f32(fp8::from_f32(x.to_f32())), "{x}");
        }
    });
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    on_each_with_fp8(|gpu| {
        let inputs = 32;
        let mut x = numbers(6 * inputs, 1);
        x[inputs + 3] = f32::NAN;
        x[2 * inputs..3 * inputs].fill(0.0);
        x[3 * inputs] = f32::INFINITY;
        x[4 * inputs..5 * inputs].iter_mut().for_each(|x| *x *= 1e-38);
        let w = Fp8Rows::quantise(&numbers(16 * inputs, 2), inputs);
        let layer = layer(gpu, &w, None).unwrap();
        let mut y = gpu.zeros::<f32>(6 * 16).unwrap();
        layer.forward(gpu, gpu.upload(&rounded::<bf16>(&x)).unwrap().all(), y.all_mut()).unwrap();
        let y = y.to_vec().unwrap();
        let row = |row: usize| &y[row * 16..][..16];
        assert!(row(1).iter().chain(row(3)).all(|y| y.is_nan()));
        assert_eq!(row(2), [0.0; 16]);
        assert!(row(4).iter().all(|y| y.abs() < 1e-30));
        let expected = reference::linear(&numbers(6 * inputs, 1), &numbers(16 * inputs, 2), None, inputs);
        for row_of in [0, 5] {
            // Three bits of mantissa on both sides.
            assert_within(row(row_of), &expected[row_of * 16..][..16], 0.2, &format!("row {row_of}"));
        }
    });
}

#[test]
fn the_error_against_bf16_is_that_of_three_bits() {
    on_each_with_fp8(|gpu| {
        let (rows, inputs, outputs) = (16, 1024, 64);
        let (x, w): (Vec<bf16>, Vec<bf16>) =
            (rounded(&numbers(rows * inputs, 1)), rounded(&numbers(outputs * inputs, 2)));
        let mut results = [gpu.zeros::<f32>(rows * outputs).unwrap(), gpu.zeros::<f32>(rows * outputs).unwrap()];
        let layers = [
            gpu::Linear::new(gpu, &w, None, inputs).unwrap(),
            layer(gpu, &Fp8Rows::quantise(&w, inputs), None).unwrap(),
        ];
        for (layer, y) in layers.iter().zip(&mut results) {
            layer.forward(gpu, gpu.upload(&x).unwrap().all(), y.all_mut()).unwrap();
        }
        let [plain, fp8] = results.map(|y| y.to_vec().unwrap());
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
        // Every number has an error of 2^-4 at most, in one direction as often as in the other.
        let error = squares(&mut plain.iter().zip(&fp8).map(|(a, b)| a - b)) / squares(&mut plain.iter().copied());
        assert!(0.001 < error && error < 0.06, "{error}");
    });
}

#[test]
fn bytes_are_foretold_and_shapes_that_do_not_fit_are_refused() {
    on_each_with_fp8(|gpu| {
        let w = Fp8Rows::quantise(&numbers(48 * 32, 1), 32);
        let before = gpu.memory().unwrap().free;
        let layer = layer(gpu, &w, None).unwrap();
        let [bytes, room] = gpu::stacked_bytes::<bf16>(&[(32, Held::Fp8), (16, Held::Fp8)], 32);
        assert_eq!((layer.bytes(), bytes), (48 * (32 + 4), 48 * (32 + 4)));
        assert!(room > 0 && gpu.memory().unwrap().free <= before - bytes - room);
        for (inputs, outputs) in [(24, 32), (32, 24)] {
            let refused = super::fp8::layer(gpu, &Fp8Rows::quantise(&numbers(inputs * outputs, 1), inputs), None);
            assert!(
                matches!(&refused, Err(GpuError::Unsupported(reason)) if reason.contains("multiple of 16")),
                "{refused:?}"
            );
        }
        // In f32 they are expanded.
        let part = Matrix { weights: Rows::Fp8(&w), bias: None };
        let wide = gpu::Linear::<f32>::stacked(gpu, &[part], 32, &Room::new(gpu)).unwrap();
        assert_eq!(wide.bytes(), gpu::stacked_bytes::<f32>(&[(48, Held::Fp8)], 32)[0]);
        let x = numbers(3 * 32, 2);
        let mut y = gpu.zeros::<f32>(3 * 48).unwrap();
        wide.forward(gpu, gpu.upload(&x).unwrap().all(), y.all_mut()).unwrap();
        let expected = reference::linear(&x, &w.expand::<f32>(), None, 32);
        assert_within(&y.to_vec().unwrap(), &expected, 1e-5, "expanded");
    });
}
