/* A stand-in for libnvidia-ml.so.1: three GPUs with known values, for the real binding to load.

   GPU 0 has everything, GPU 1 is older than Hopper, and of GPU 2 only the UUID can be read.
   NVML_STUB names one variation; NVML_STUB_REPORT a file that receives the counts at shutdown. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, NOT_LOADED = 9, LOST = 15, INVALID = 2 };

typedef struct { int index; } Device;
typedef struct { double taken_s; } Sample;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned version, supported; } Support;
typedef struct { unsigned id; int result; double value; char *names[3]; } Metric;
typedef struct { unsigned version, count; Sample *first, *second; Metric metrics[]; } Request;

static Device devices[3] = {{0}, {1}, {2}};
static const char *uuids[3] = {"GPU-00000000-aaaa", "GPU-11111111-bbbb", "GPU-22222222-cccc"};
static int allocated, freed, windows;
static double shortest_s = 1e9;

static int variation(const char *name) {
    const char *chosen = getenv("NVML_STUB");
    return chosen && !strcmp(chosen, name);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (variation("hang")) sleep(60);
    return variation("no_module") ? NOT_LOADED : SUCCESS;
}

int nvmlShutdown(void) {
    const char *path = getenv("NVML_STUB_REPORT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "{\"allocated\": %d, \"freed\": %d, \"windows\": %d, \"shortest_s\": %f}", allocated, freed,
                windows, shortest_s);
        fclose(file);
    }
    return SUCCESS;
}

const char *nvmlErrorString(int result) { (void)result; return "stub error"; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = variation("no_gpu") ? 0 : 3; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (index > 2) return INVALID;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    for (int i = 0; i < 3; i++)
        if (!strcmp(uuid, uuids[i])) { *device = &devices[i]; return SUCCESS; }
    if (!strcmp(uuid, "MIG-00000000-dddd")) { *device = &devices[0]; return SUCCESS; }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "%s", uuids[device->index]);
    return SUCCESS;
}

int nvmlDeviceGetIndex(Device *device, unsigned *index) {
    if (device->index == 2) return LOST;
    *index = device->index;
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *slice, Device **parent) { *parent = slice; return SUCCESS; }

int nvmlDeviceGetGpuInstanceId(Device *slice, unsigned *id) { (void)slice; *id = 7; return SUCCESS; }

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    if (device->index == 2) return LOST;
    if (variation("no_rates")) return NOT_SUPPORTED;
    if (variation("crash")) abort();
    rates->gpu = device->index ? 40 : 90;
    rates->memory = 10;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory *memory) {
    if (device->index == 2) return LOST;
    memory->total = 80000000000ull;
    memory->reserved = 500000000ull;
    memory->used = device->index ? 1000000000ull : 6000000000ull;
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}

int nvmlGpmQueryDeviceSupport(Device *device, Support *support) {
    if (device->index == 2) return LOST;
    support->supported = device->index == 0;
    return SUCCESS;
}

int nvmlGpmSampleAlloc(Sample **sample) {
    *sample = calloc(1, sizeof(Sample));
    allocated++;
    return SUCCESS;
}

int nvmlGpmSampleFree(Sample *sample) { free(sample); freed++; return SUCCESS; }

int nvmlGpmSampleGet(Device *device, Sample *sample) {
    (void)device;
    if (variation("no_sample")) return NOT_SUPPORTED;
    sample->taken_s = now_s();
    return SUCCESS;
}

int nvmlGpmMigSampleGet(Device *device, unsigned instance, Sample *sample) {
    return instance == 7 ? nvmlGpmSampleGet(device, sample) : INVALID;
}

int nvmlGpmMetricsGet(Request *request) {
    if (variation("no_metrics")) return NOT_SUPPORTED;
    double window_s = request->second->taken_s - request->first->taken_s;
    if (window_s < shortest_s) shortest_s = window_s;
    windows++;
    for (unsigned i = 0; i < request->count; i++) {
        Metric *metric = &request->metrics[i];
        metric->result = SUCCESS;
        switch (metric->id) {
        case 1: metric->value = variation("idle") ? 0.0 : 80.0; break;
        case 2: metric->value = 70.0; break;
        case 3: metric->value = variation("idle") ? 0.0 : 20.0; break;
        case 5: metric->value = variation("odd") ? 0.0 / 0.0 : 25.0; break;
        case 10:
            metric->value = 50.0;
            if (variation("odd")) metric->result = NOT_SUPPORTED;
            break;
        default: metric->result = INVALID;
        }
    }
    return SUCCESS;
}
