//! Every type against candle's own `dequantize`.

use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::Format;

const TYPES: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Bytes, or numbers, without a pattern that a layout could share.
fn noise() -> impl Iterator<Item = u32> {
    std::iter::successors(Some(1u64), |state| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(12_345)))
        .map(|state| (state >> 33) as u32)
}

/// The bits of the weights, both zeros the same.
fn bits(weights: &[f32]) -> Vec<u32> {
    weights.iter().map(|weight| (weight + 0.0).to_bits()).collect()
}

#[track_caller]
fn check(tensor: &QTensor) {
    let (rows, inputs) = tensor.shape().dims2().unwrap();
    let unpacked = Format::of(tensor.dtype()).unwrap().unpack(&tensor.data().unwrap(), rows, inputs).unwrap();
    let expected = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(unpacked.rows(), rows);
    assert!(bits(&unpacked.expand::<f32>()) == bits(&expected), "{:?}", tensor.dtype());
}

#[test]
fn the_weights_of_every_type_are_candles_to_the_bit() {
    let values: Vec<f32> =
        noise().take(7 * 512).enumerate().map(|(i, n)| (n % 20_011) as f32 / 1e4 - 1.0 + (i / 900) as f32).collect();
    let tensor = Tensor::from_vec(values, (7, 512), &Device::Cpu).unwrap();
    TYPES.into_iter().for_each(|dtype| check(&QTensor::quantize(&tensor, dtype).unwrap()));
}

/// Quantising leaves corners out: scales below 0, and integers that it never makes.
#[test]
fn blocks_of_any_bits_are_candles_to_the_bit() {
    for dtype in TYPES {
        let format = Format::of(dtype).unwrap();
        assert_eq!((format.bytes, format.groups.sizes().0), (dtype.type_size(), dtype.block_size()));
        // f16s of 255 are no numbers, so the block's own are set: the largest, the smallest, and one below 0.
        for (scale, min) in [(0x7bffu16, 0xfbffu16), (0x0001, 0x8001), (0xb123, 0x3456)] {
            let all_ones = std::iter::repeat_n(u8::MAX, format.bytes);
            let random = noise().map(|n| n as u8).take(6 * format.bytes);
            let mut data: Vec<u8> = all_ones.chain(random).chain(std::iter::repeat_n(0, format.bytes)).collect();
            for block in data.chunks_exact_mut(format.bytes) {
                block[format.scale..][..2].copy_from_slice(&scale.to_le_bytes());
                if let Some(at) = format.min {
                    block[at..][..2].copy_from_slice(&min.to_le_bytes());
                }
            }
            check(&qtensor_from_ggml(dtype, &data, vec![4, 2 * dtype.block_size()], &Device::Cpu).unwrap());
        }
    }
}

#[test]
fn data_of_another_length_is_refused() {
    for dtype in TYPES {
        let (format, block) = (Format::of(dtype).unwrap(), dtype.block_size());
        let data = vec![0; 6 * dtype.type_size()];
        assert!(format.unpack(&data, 3, 2 * block).is_ok());
        for (data, rows, inputs) in [
            (&data[1..], 3, 2 * block),
            (&data[..], 3, block),
            (&data[..], 4, 2 * block),
            (&data[..], usize::MAX, 2 * block),
            (&data[..], 3, usize::MAX / block * block),
        ] {
            let reason = format.unpack(data, rows, inputs).unwrap_err();
            assert!(reason.contains("bytes for"), "{reason}");
        }
        for inputs in [0, 2 * block - 1, block / 2] {
            assert!(format.unpack(&data, 3, inputs).unwrap_err().contains("in blocks of"));
        }
    }
}

#[test]
fn types_that_are_no_integers_with_scales_have_no_format() {
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_1, GgmlDType::Q8K] {
        assert!(Format::of(dtype).is_none());
    }
}
