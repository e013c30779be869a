// A driver that has GPUs only on paper: it writes down the calls of driver.py, and runs nothing.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static std::string calls;
static int from_environment(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}
static int devices = from_environment("FAKE_GPUS", 1), capability = from_environment("FAKE_CAPABILITY", 90);

extern "C" {
const char* fake_calls() { return calls.c_str(); }
void fake_set(int num, int cc) { devices = num, capability = cc, calls.clear(); }

int cuInit(unsigned) { return devices < 0 ? 100 : 0; }
int cuDeviceGetName(char* name, int size, int device) { return std::snprintf(name, size, "NVIDIA Paper %d", device), 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = size_t(60) << 30, *total = size_t(80) << 30, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return calls += "release " + std::to_string(device) + "\n", 0; }
int cuDeviceGetCount(int* n) { return *n = devices, 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
    *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : which == 16 ? 132 : -1;
    return device < devices ? 0 : 101;
}
int cuGetErrorName(int code, const char** text) {
    *text = code == 200 ? "CUDA_ERROR_INVALID_IMAGE" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = reinterpret_cast<void*>(0x1234), 0; }
int cuCtxSetCurrent(void* context) {
    calls += "current " + std::to_string(reinterpret_cast<long>(context)) + "\n";
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    if (std::memcmp(image, "\x7f" "ELF", 4)) return 200;
    return *module = reinterpret_cast<void*>(0x77), calls += "load\n", 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
    if (!std::strcmp(name, "missing")) return 500;
    return *function = const_cast<char*>(strdup(name)), 0;
}
int cuFuncSetAttribute(void* function, int which, int value) {
    calls += std::string("attribute ") + static_cast<char*>(function) + " " + std::to_string(which) + " " + std::to_string(value) + "\n";
    return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                   void* stream, void** arguments, void** extra) {
    char line[300];
    std::snprintf(line, sizeof line, "launch %s %u %u %u, %u %u %u, %u, stream %ld: %d %.2f %lx %lx extra %ld\n",
                  static_cast<char*>(function), x, y, z, tx, ty, tz, shared, reinterpret_cast<long>(stream),
                  *static_cast<int*>(arguments[0]), *static_cast<float*>(arguments[1]), *static_cast<long*>(arguments[2]),
                  *static_cast<long*>(arguments[3]), reinterpret_cast<long>(extra));
    calls += line;
    return 0;
}
}
