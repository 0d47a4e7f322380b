// Kernels that do nothing, for what starting them costs.
extern "C" __global__ void nothing() {}
extern "C" __global__ void eight(float* a, float* b, float* c, float* d, int m, int n, int k, float x) {
    if (m < 0) a[0] = b[0] + c[0] * d[0] + n + k + x;
}
