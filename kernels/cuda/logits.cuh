// What logits are between a vocabulary head and a soft-max.
#pragma once

#include "device.cuh"

__device__ __forceinline__ float capped(float logit, float softcap) {
    return softcap == 0 ? logit : softcap * tanhf(logit / softcap);
}

// How the capped logit changes with the logit: the slope of `cap * tanh(x / cap)` is `1 - tanh(x / cap)^2`.
__device__ __forceinline__ float cap_slope(float capped, float softcap) {
    return softcap == 0 ? 1 : 1 - (capped / softcap) * (capped / softcap);
}
