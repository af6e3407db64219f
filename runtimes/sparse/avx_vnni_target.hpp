// What follows is compiled for AVX2, FMA and AVX-VNNI.
//
// OBC_AVX_VNNI_AS_AVX512 takes the one instruction of AVX-VNNI from AVX512-VNNI, where it is the same
// but for its encoding: so tests run these kernels on processors that have no other (g++ alone).
#if defined(OBC_AVX_VNNI_AS_AVX512)
#pragma GCC target("avx2,fma,avx512vl,avx512vnni")
#define OBC_DPBUSD _mm256_dpbusd_epi32
#else
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif
#define OBC_DPBUSD _mm256_dpbusd_avx_epi32
#endif
