//! Gradients on every GPU that there is, the emulated one among them, against those on the CPU.

#![cfg(feature = "gpu")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

#[expect(dead_code, reason = "other tests take the rest")]
mod common;

use common::{assert_close, assert_within, numbers, on_each, rounded, widened};
use half::bf16;
use plumb_kernels::activation::Activation;
use plumb_kernels::gpu::gradient::{Columns, Losses, Scatter, Slopes, Targets};
use plumb_kernels::gpu::{self, Gpu, Output, Peers};
use plumb_kernels::gradient::{self, AdamW, TopK};
use plumb_kernels::norm::Norm;
use plumb_kernels::{Element, reference};

#[test]
fn norms_go_back_as_on_the_cpu() {
    on_each(|gpu| {
        for (rows, width) in [(1, 4), (3, 100), (150, 72), (2, 8196), (65, 2304)] {
            let (x, dy) = (numbers(rows * width, 1), numbers(rows * width, 2));
            let (weight, bias) = (numbers(width, 3), numbers(width, 4));
            let rms = Norm::Rms { weight: weight.clone(), eps: 1e-2 };
            let layer = Norm::Layer { weight, bias, eps: 1e-2 };
            let (gpu_x, gpu_dy) = (gpu.upload(&x).unwrap(), gpu.upload(&dy).unwrap());
            // What is in there already stays.
            let before = numbers(x.len(), 5);
            for (name, norm) in [("rms", rms), ("layer", layer)] {
                let mut weights = numbers(norm.weights(), 6);
                let mut expected = before.clone();
                let (mut dx, mut d_weights) = (gpu.upload(&before).unwrap(), gpu.upload(&weights).unwrap());
                norm.backward(&x, &dy, &mut expected, &mut weights);
                let mut parts = gpu.upload(&[f32::NAN; 10]).unwrap();
                let norm = gpu::Norm::new(gpu, &norm).unwrap();
                norm.backward(gpu, gpu_x.all(), gpu_dy.all(), dx.all_mut(), d_weights.all_mut(), &mut parts).unwrap();
                let what = format!("{name} norm of {rows} x {width}");
                assert_close(&dx.to_vec().unwrap(), &expected, &what);
                assert_within(&d_weights.to_vec().unwrap(), &weights, 1e-4, &what);
            }
        }
    });
}

#[test]
fn norms_take_new_weights() {
    on_each(|gpu| {
        let (width, x) = (8, numbers(16, 1));
        let values = numbers(2 * width, 2);
        let (weight, bias) = values.split_at(width);
        let offset: Vec<f32> = weight.iter().map(|w| w + 1.0).collect();
        let ones = vec![1.0; width];
        let rms = Norm::Rms { weight: ones.clone(), eps: 1e-5 };
        let layer = Norm::Layer { weight: ones.clone(), bias: ones, eps: 1e-5 };
        let expected_rms = reference::rms_norm(&x, &offset, 1e-5);
        let expected_layer = reference::layer_norm(&x, weight, bias, 1e-5);
        let (values, gpu_x) = (gpu.upload(&values).unwrap(), gpu.upload(&x).unwrap());
        for (norm, len, offset, expected) in [(rms, width, 1.0, expected_rms), (layer, 2 * width, 0.0, expected_layer)]
        {
            let mut norm = gpu::Norm::new(gpu, &norm).unwrap();
            norm.set(gpu, values.view(0..len), offset).unwrap();
            let mut out = gpu.zeros::<f32>(x.len()).unwrap();
            norm.forward(gpu, gpu_x.all(), None, out.all_mut()).unwrap();
            assert_close(&out.to_vec().unwrap(), &expected, "a norm with new weights");
        }
    });
}

fn activations<E: Element>(gpu: &Gpu) {
    let (rows, width) = (5, 92);
    let whole: Vec<E> = rounded(&numbers(rows * 2 * width, 1).iter().map(|x| x * 5.0).collect::<Vec<_>>());
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        let d = numbers(rows * 2 * width, 2);
        let (mut x, mut inner) = (gpu.upload(&whole).unwrap(), gpu.zeros::<E>(whole.len()).unwrap());
        let gpu_d = gpu.upload(&d).unwrap();
        gpu.activate_backward(activation, false, x.all_mut(), 2 * width, gpu_d.all(), inner.all_mut()).unwrap();
        let (mut up, mut value) = (widened(&whole), vec![0.0; whole.len()]);
        activation.backward(None, &mut up, &d, &mut value);
        assert_close(&x.to_vec().unwrap(), &up, &format!("{activation:?}"));
        assert_close(&inner.to_vec().unwrap(), &value, &format!("{activation:?}"));

        let d = &d[..rows * width];
        let (mut x, mut inner) = (gpu.upload(&whole).unwrap(), gpu.zeros::<E>(d.len()).unwrap());
        let gpu_d = gpu.upload(d).unwrap();
        gpu.activate_backward(activation, true, x.all_mut(), width, gpu_d.all(), inner.all_mut()).unwrap();
        let half = |first: usize| {
            whole.chunks_exact(2 * width).flat_map(|row| widened(&row[first..first + width])).collect::<Vec<f32>>()
        };
        let (mut gate, mut up, mut value) = (half(0), half(width), vec![0.0; d.len()]);
        activation.backward(Some(&mut gate), &mut up, d, &mut value);
        let rows = gate.chunks_exact(width).zip(up.chunks_exact(width));
        let expected: Vec<f32> = rows.flat_map(|(gate, up)| [gate, up].concat()).collect();
        assert_close(&x.to_vec().unwrap(), &expected, &format!("gated {activation:?}"));
        assert_close(&inner.to_vec().unwrap(), &value, &format!("gated {activation:?}"));
    }
}

#[test]
fn activations_go_back_as_on_the_cpu() {
    on_each(|gpu| {
        activations::<f32>(gpu);
        activations::<bf16>(gpu);
    });
}

fn products<E: Output<E>>(gpu: &Gpu)
where
    f32: Output<E>,
{
    for (rows, inputs, outputs) in [(1, 8, 16), (70, 40, 24), (130, 72, 136)] {
        let what = format!("{rows} x {inputs} x {outputs}");
        let wide = if size_of::<E>() == 2 { 1e-4 } else { 2e-5 };
        let (x, w): (Vec<E>, Vec<E>) = (rounded(&numbers(rows * inputs, 1)), rounded(&numbers(outputs * inputs, 2)));
        let dy: Vec<E> = rounded(&numbers(rows * outputs, 3));
        let layer = gpu::Linear::new(gpu, &w, None, inputs).unwrap();
        let gpu_dy = gpu.upload(&dy).unwrap();
        let transposed: Vec<f32> =
            (0..inputs).flat_map(|i| w.iter().skip(i).step_by(inputs).map(|w| w.to_f32())).collect();
        let expected = reference::linear(&widened(&dy), &transposed, None, outputs);
        let mut dx = gpu.upload(&vec![f32::NAN; rows * inputs]).unwrap();
        layer.backward(gpu, gpu_dy.all(), dx.all_mut()).unwrap();
        assert_within(&dx.to_vec().unwrap(), &expected, wide, &what);
        // In two parts.
        let narrow = |first: usize, count: usize| -> Vec<E> {
            dy.chunks_exact(outputs).flat_map(|row| row[first..first + count].to_vec()).collect()
        };
        for (first, count, add) in [(0, 8, false), (8, outputs - 8, true)] {
            let dy = gpu.upload(&narrow(first, count)).unwrap();
            layer.part_backward(gpu, first, count, dy.all(), dx.all_mut(), add).unwrap();
        }
        assert_within(&dx.to_vec().unwrap(), &expected, wide, &what);

        // Of all outputs, and of some; at addresses that are multiples of little.
        let gpu_x = gpu.upload(&x).unwrap();
        for (first, count) in [(0, outputs), (8, outputs - 8)] {
            let before = numbers(4 + count * inputs, 4);
            let mut expected = before[4..].to_vec();
            let mut outer = gradient::Outer::default();
            outer.take(&x, inputs);
            outer.add(&narrow(first, count), &mut expected);
            let mut sums = gpu.upload(&before).unwrap();
            let columns = Columns::part(gpu_dy.all(), outputs, first, count);
            gpu.add_outer(gpu_x.all(), inputs, columns, sums.view_mut(4..before.len())).unwrap();
            let sums = sums.to_vec().unwrap();
            assert_within(&sums[4..], &expected, 10.0 * wide, &what);
            assert_eq!(sums[..4], before[..4], "{what}");

            let mut expected = before[..count].to_vec();
            gradient::column_sums(&narrow(first, count), &mut expected);
            let mut sums = gpu.upload(&before[..count]).unwrap();
            let mut parts = gpu.empty();
            gpu.column_sums(columns, sums.all_mut(), &mut parts).unwrap();
            assert_within(&sums.to_vec().unwrap(), &expected, 1e-5, &what);
        }
    }
}

#[test]
fn linear_layers_go_back_as_on_the_cpu() {
    on_each(|gpu| {
        products::<f32>(gpu);
        products::<bf16>(gpu);
    });
}

fn new_weights<E: Output<E>>(gpu: &Gpu)
where
    f32: Output<E>,
{
    let (inputs, outputs) = (8, 16);
    let (x, before, after) = (numbers(inputs, 1), numbers(inputs * outputs, 2), numbers(inputs * 8, 3));
    let (bias, new_bias) = (numbers(outputs, 4), numbers(8, 5));
    let mut layer = gpu::Linear::<E>::new(gpu, &rounded(&before), Some(&bias), inputs).unwrap();
    gpu.round(gpu.upload(&after).unwrap().all(), layer.weights_mut(8, 8).unwrap()).unwrap();
    layer.set_bias(gpu, 8, gpu.upload(&new_bias).unwrap().all()).unwrap();
    let weights: Vec<E> = rounded(&[&before[..8 * inputs], &after].concat());
    let x: Vec<E> = rounded(&x);
    let expected = reference::linear(&widened(&x), &widened(&weights), Some(&[&bias[..8], &new_bias].concat()), inputs);
    let gpu_x = gpu.upload(&x).unwrap();
    let (mut wide, mut narrow) = (gpu.zeros::<f32>(outputs).unwrap(), gpu.zeros::<E>(outputs).unwrap());
    layer.forward(gpu, gpu_x.all(), wide.all_mut()).unwrap();
    layer.forward(gpu, gpu_x.all(), narrow.all_mut()).unwrap();
    assert_within(&wide.to_vec().unwrap(), &expected, 1e-4, "new weights");
    assert_close(&narrow.to_vec().unwrap(), &expected, "new weights");
}

#[test]
fn linear_layers_take_new_weights() {
    on_each(|gpu| {
        new_weights::<f32>(gpu);
        new_weights::<bf16>(gpu);
    });
}

#[test]
fn rows_are_added_where_they_belong() {
    on_each(|gpu| {
        let width = 516;
        let to = [7u32, 0, 2, 7, 7, 1, 2];
        let (x, before) = (numbers(to.len() * width, 1), numbers(8 * width, 2));
        let mut expected = before.clone();
        gradient::add_rows(&x, &to, 0.5, &mut expected, width);
        let (mut scatter, mut sums) = (Scatter::new(gpu), gpu.upload(&before).unwrap());
        // What was in the lists before is not seen.
        scatter.set(&[3; 20]).unwrap();
        scatter.set(&to).unwrap();
        gpu.add_rows(gpu.upload(&x).unwrap().all(), &scatter, 0.5, sums.all_mut(), width).unwrap();
        assert_close(&sums.to_vec().unwrap(), &expected, "rows");
    });
}

fn losses<E: Output<E>>(gpu: &Gpu)
where
    f32: Output<E>,
{
    // More tokens than a tile has, and no even number of them.
    let (tokens, inputs, rows) = (8192 + 301, 16, 3);
    let weights: Vec<E> = rounded(&numbers(tokens * inputs, 1).iter().map(|w| w * 4.0).collect::<Vec<_>>());
    let x: Vec<E> = rounded(&numbers(rows * inputs, 2));
    let row_weights = [0.5f32, 2.0, 0.25];
    let targets = [8300u32, 0, 8191];
    let (ids, log_probs) = ([8192u32, 5, 8000, 1, 8492, 3], [-0.5f32, -1.5, -3.0, -1.0, -2.0, -0.1]);
    let teachers: Vec<TopK<'_>> =
        [0..3, 3..5, 5..6].map(|range| TopK { ids: &ids[range.clone()], log_probs: &log_probs[range] }).to_vec();
    let head = gpu::Linear::new(gpu, &weights, None, inputs).unwrap();
    let gpu_x = gpu.upload(&x).unwrap();
    let mut kernel = Losses::new(gpu);
    let tolerance = if size_of::<E>() == 2 { 0.01 } else { 1e-4 };
    for softcap in [None, Some(3.0f32)] {
        for taught in [false, true] {
            let what = format!("taught: {taught}, {softcap:?}");
            let mut logits = reference::linear(&widened(&x), &widened(&weights), None, inputs);
            let (mut expected, mut d) = (vec![0.0; rows], vec![0f32; rows * tokens]);
            match taught {
                false => gradient::cross_entropy(&mut logits, softcap, &targets, &row_weights, &mut expected, &mut d),
                true => gradient::distillation(&mut logits, softcap, &teachers, &row_weights, &mut expected, &mut d),
            }
            let mut d_x = gpu.upload(&vec![f32::NAN; x.len()]).unwrap();
            let before = numbers(weights.len(), 3);
            let mut d_head = gpu.upload(&before).unwrap();
            let slopes = Slopes { weights: &row_weights, d_x: d_x.all_mut(), d_head: d_head.all_mut() };
            let of = if taught { Targets::Teachers(&teachers) } else { Targets::Tokens(&targets) };
            let mut found = gpu.zeros(rows).unwrap();
            kernel.run(&head, softcap, gpu_x.all(), of, found.all_mut(), Some(slopes)).unwrap();
            let found = found.to_vec().unwrap();
            assert_within(&found, &expected, 1e-4, &what);
            let mut forward = gpu.zeros(rows).unwrap();
            kernel.run(&head, softcap, gpu_x.all(), of, forward.all_mut(), None).unwrap();
            assert_eq!(forward.to_vec().unwrap(), found, "{what}");

            let (mut expected_x, mut expected_head) = (vec![0.0; x.len()], before);
            for (row, d) in d.chunks_exact(tokens).enumerate() {
                for (token, d) in d.iter().enumerate() {
                    for i in 0..inputs {
                        expected_x[row * inputs + i] += d * weights[token * inputs + i].to_f32();
                        expected_head[token * inputs + i] += d * x[row * inputs + i].to_f32();
                    }
                }
            }
            assert_within(&d_x.to_vec().unwrap(), &expected_x, tolerance, &what);
            assert_within(&d_head.to_vec().unwrap(), &expected_head, tolerance, &what);
        }
    }
}

#[test]
fn losses_on_a_vocabulary_are_those_of_the_cpu() {
    on_each(|gpu| {
        losses::<f32>(gpu);
        losses::<bf16>(gpu);
    });
}

#[test]
fn pairs_have_the_slopes_of_the_cpu() {
    on_each(|gpu| {
        let mut rewards: Vec<f32> = numbers(600, 1).iter().map(|r| 10.0 * r).collect();
        rewards.extend([300.0, -300.0, -300.0, 300.0, 2.0, 2.0, f32::NAN, 1.0]);
        let mut expected = vec![0.0; rewards.len()];
        gradient::pair_slopes(&rewards, 0.125, &mut expected);
        let mut slopes = gpu.zeros::<f32>(rewards.len()).unwrap();
        gpu.pair_slopes(gpu.upload(&rewards).unwrap().all(), 0.125, slopes.all_mut()).unwrap();
        let found = gpu.read(slopes.all()).unwrap();
        let numbers = rewards.len() - 2;
        assert_close(&found[..numbers], &expected[..numbers], "slopes");
        assert!(found[numbers..].iter().chain(&expected[numbers..]).all(|slope| slope.is_nan()));
    });
}

#[test]
fn rewards_go_back() {
    on_each(|gpu| {
        let (rows, width) = (5, 300);
        let (x, weight, d) = (numbers(rows * width, 1), numbers(width, 2), numbers(rows, 3));
        let before = numbers(width + 2, 4);
        let [gpu_x, gpu_weight, gpu_d] = [&x, &weight, &d].map(|values| gpu.upload(values).unwrap());
        let mut d_x = gpu.zeros::<f32>(x.len()).unwrap();
        for biased in [false, true] {
            let mut sums = gpu.upload(&before).unwrap();
            let d_head = sums.view_mut(0..width + usize::from(biased));
            gpu.rewards_backward(gpu_x.all(), gpu_weight.all(), gpu_d.all(), d_x.all_mut(), d_head).unwrap();
            let mut expected = before.clone();
            for (d, x) in d.iter().zip(x.chunks_exact(width)) {
                x.iter().zip(&mut expected).for_each(|(x, sum)| *sum += d * x);
                expected[width] += if biased { *d } else { 0.0 };
            }
            assert_close(&sums.to_vec().unwrap(), &expected, "head");
            let expected: Vec<f32> = d.iter().flat_map(|d| weight.iter().map(move |w| d * w)).collect();
            assert_close(&d_x.to_vec().unwrap(), &expected, "rows");
        }
    });
}

fn steps<E: Element>(gpu: &Gpu) {
    let len = 1000;
    let (mut weights, mut mean, mut square) = (numbers(len, 1), vec![0.0; len], vec![0.0; len]);
    let [mut gpu_weights, mut gpu_mean, mut gpu_square] = [&weights, &mean, &square].map(|v| gpu.upload(v).unwrap());
    let mut copy = gpu.zeros::<E>(len).unwrap();
    for step in 1..=3 {
        let how = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step, scale: 0.5 };
        let gradient = numbers(len, 1 + step as usize);
        how.update(&mut weights, &gradient, &mut mean, &mut square);
        let gradient = gpu.upload(&gradient).unwrap();
        let means = [gpu_mean.all_mut(), gpu_square.all_mut()];
        let to = (step > 1).then(|| copy.all_mut());
        how.update_on(gpu, gpu_weights.all_mut(), gradient.all(), means, to).unwrap();
        let expected = if step > 1 { gpu_weights.to_vec().unwrap() } else { vec![0.0; len] };
        assert!(copy.to_vec().unwrap() == rounded::<E>(&expected), "the decoder's copy after step {step}");
    }
    assert_within(&gpu_weights.to_vec().unwrap(), &weights, 2e-5, "weights");
    assert_close(&gpu_mean.to_vec().unwrap(), &mean, "mean");
    assert_close(&gpu_square.to_vec().unwrap(), &square, "square");
}

#[test]
fn steps_are_those_of_the_cpu() {
    on_each(|gpu| {
        steps::<f32>(gpu);
        steps::<bf16>(gpu);
    });
}

#[test]
fn sums_over_many_pieces() {
    on_each(|gpu| {
        for len in [1, 255, 70_001] {
            let values = numbers(len, 1);
            let mut x = gpu.upload(&values).unwrap();
            let expected = gradient::sum_of_squares(&values);
            let found = gpu.sum_of_squares(x.all()).unwrap();
            assert!((found - expected).abs() <= 1e-6 * expected, "{len}: {found} {expected}");
            let twice = gpu.upload(&values).unwrap();
            gpu.add(twice.all(), x.all_mut()).unwrap();
            assert!(x.to_vec().unwrap().iter().zip(&values).all(|(sum, x)| *sum == 2.0 * x), "{len}");
            gpu.fill(x.view_mut(1..len), 3.0).unwrap();
            let filled = x.to_vec().unwrap();
            assert!(filled[0] == 2.0 * values[0] && filled[1..].iter().all(|x| *x == 3.0), "{len}");
        }
    });
}

#[test]
fn copies_are_rounded() {
    on_each(|gpu| {
        let values = numbers(777, 1);
        let x = gpu.upload(&values).unwrap();
        let (mut wide, mut narrow) = (gpu.zeros::<f32>(777).unwrap(), gpu.zeros::<bf16>(777).unwrap());
        gpu.round(x.all(), wide.all_mut()).unwrap();
        gpu.round(x.all(), narrow.all_mut()).unwrap();
        assert_eq!(wide.to_vec().unwrap(), values);
        assert_eq!(narrow.to_vec().unwrap(), rounded::<bf16>(&values));
    });
}

/// Processes whose GPUs add up two lists each, of so many numbers: in one order, and again for another sum.
fn sums_of_peers(peers: Vec<(Gpu, Peers)>, len: usize) {
    let count = peers.len();
    // In f32 the order shows: large numbers swallow small ones.
    let list = |rank: usize, round: usize| -> Vec<f32> {
        let large = [1.0, 1e7, -1e7][(rank + round) % 3];
        numbers(len, 7 * round + rank).iter().map(|x| x * large).collect()
    };
    let expected = |first: usize| {
        let mut sum = list(0, first);
        let rest = (0..2 * count).skip(1).map(|i| list(i % count, first + i / count));
        rest.for_each(|list| gradient::add(&list, &mut sum));
        sum
    };
    std::thread::scope(|scope| {
        for (rank, (gpu, mut peers)) in peers.into_iter().enumerate() {
            scope.spawn(move || {
                for first in [0, 2] {
                    for round in 0..2 {
                        let own = gpu.upload(&list(rank, first + round)).unwrap();
                        peers.add(own.all(), round == 0).unwrap();
                    }
                    let mut whole = gpu.upload(&vec![f32::NAN; len]).unwrap();
                    peers.collect(whole.all_mut()).unwrap();
                    assert!(whole.to_vec().unwrap() == expected(first), "{len} numbers of {rank} among {count}");
                }
            });
        }
    });
}

#[test]
fn gpus_of_several_processes_add_up_in_the_order_of_the_processes() {
    on_each(|gpu| sums_of_peers(vec![(gpu.clone(), gpu.alone())], 1001));
    #[cfg(feature = "emulated")]
    for (count, len, piece) in [(1, 5, 2), (2, 1001, 4096), (3, 1001, 100), (4, 1002, 83), (4, 3, 2)] {
        sums_of_peers(Peers::emulated(count, piece), len);
    }
    #[cfg(feature = "cuda")]
    {
        let gpus: Vec<Gpu> = (0..16).map_while(|number| Gpu::cuda(number).ok()).collect();
        match gpus.first().map(Gpu::meeting_id) {
            Some(Ok(id)) => {
                let meet = |(rank, gpu): (usize, &Gpu)| (gpu.clone(), gpu.meet(&id, rank, gpus.len()).unwrap());
                let peers = std::thread::scope(|scope| {
                    let met: Vec<_> = gpus.iter().enumerate().map(|one| scope.spawn(move || meet(one))).collect();
                    met.into_iter().map(|met| met.join().unwrap()).collect()
                });
                sums_of_peers(peers, 10_000_019);
            }
            other => eprintln!("skipped: {other:?}"),
        }
    }
}
