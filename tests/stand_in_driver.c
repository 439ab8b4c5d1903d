/* A GPU's driver without a GPU, as libcuda.so.1: it loads nothing, and prints what it is told to launch, a line each:
   kernel, grid, shared memory. Any memory is the GPU's. */
#include "cuda.h"
#include <stdio.h>
#include <string.h>

#define NOTHING(name) /* under another name here: its arguments do not matter */                                        \
    CUresult nothing_##name(void) __asm__(#name);                                                                      \
    CUresult nothing_##name(void) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return *value = 227 * 1024, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    return *value = 1024, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "an error", CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return *function = (CUfunction)strdup(name), CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    printf("%s %u %u %u\n", (char *)function, config->gridDimX, config->gridDimY, config->sharedMemBytes);
    fflush(stdout);
    return CUDA_SUCCESS;
}
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeTiled)
