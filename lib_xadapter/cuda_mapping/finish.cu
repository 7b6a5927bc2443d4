// What follows a convolution, in one pass: + bias, + residual, ReLU.
//
// Everything is channels-last (pixels, channels) in 16 bits; a thread takes eight channels, 16 bytes; sums are float32.
// No header is included: the machine that compiles this has none.

#ifdef BFLOAT16

__device__ __forceinline__ float from_bits(unsigned bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ unsigned to_bits(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // rounding could carry a NaN into infinity
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

#else

#ifdef __CUDACC__

__device__ __forceinline__ float from_bits(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}

__device__ __forceinline__ unsigned to_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif

#endif

__device__ __forceinline__ float finished(float convolution, float bias, float residual, int relu) {
    const float sum = convolution + bias + residual;
    return relu && sum < 0.0f ? 0.0f : sum;  // NaN stays NaN
}

__device__ __forceinline__ unsigned finished_pair(unsigned convolution, unsigned bias, unsigned residual, int relu) {
    const float low = finished(from_bits(convolution & 0xffffu), from_bits(bias & 0xffffu),
                               from_bits(residual & 0xffffu), relu);
    const float high = finished(from_bits(convolution >> 16), from_bits(bias >> 16), from_bits(residual >> 16), relu);
    return to_bits(low) | to_bits(high) << 16;
}

// In place: `x` holds `count` vectors of eight channels, `vectors` of them a pixel. `residual` may be null.
extern "C" __global__ void finish(uint4* x, const uint4* bias, const uint4* residual, int relu, unsigned count,
                                  unsigned vectors) {
    const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count) return;
    const uint4 c = x[place];
    const uint4 b = bias[place % vectors];
    const uint4 r = residual ? residual[place] : make_uint4(0u, 0u, 0u, 0u);
    x[place] = make_uint4(finished_pair(c.x, b.x, r.x, relu), finished_pair(c.y, b.y, r.y, relu),
                          finished_pair(c.z, b.z, r.z, relu), finished_pair(c.w, b.w, r.w, relu));
}
