/* A stand-in for libnvidia-ml.so.1: three GPUs with known values, for the real binding to load.

   GPU 0 has everything, GPU 1 is older than Hopper, and of GPU 2 only the UUID can be read.
   NVML_STUB names one variation. NVML_STUB_FAIL has calls fail: NAME/GPU:CODE@FROM,... from the FROM-th call of that
   name on; * stands for any GPU, and for any name, from the FROM-th call for utilisation on. NVML_STUB_REPORT names a file that receives the counts at shutdown. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, NOT_LOADED = 9, TIMED_OUT = 10, LOST = 15 };

typedef struct { int index; } Device;
typedef struct { double taken_s; } Sample;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned version, supported; } Support;
typedef struct { unsigned id; int result; double value; char *names[3]; } Metric;
typedef struct { unsigned version, count; Sample *first, *second; Metric metrics[]; } Request;
typedef struct { unsigned id, scope; long long stamp, latency; int kind, result; unsigned long long value; } Field;
typedef struct { Device *device; unsigned long long type, data; unsigned instance, compute; } Event;
typedef struct { char name[80]; int calls; } Counter;

static Device devices[3] = {{0}, {1}, {2}};
static const char *uuids[3] = {"GPU-00000000-aaaa", "GPU-11111111-bbbb", "GPU-22222222-cccc"};
static int allocated, freed, windows, looks, listening, waiting = 1;
static double shortest_s = 1e9;
static Counter counters[64];

static int variation(const char *name) {
    const char *chosen = getenv("NVML_STUB");
    return chosen && !strcmp(chosen, name);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int count(const char *name) {
    Counter *counter = counters;
    while (counter->calls && strcmp(counter->name, name)) counter++;
    strcpy(counter->name, name);
    return ++counter->calls;
}

/* Count a call; returns how it is to fail, SUCCESS where it is not. */
static int enter(const char *name, int gpu) {
    int calls = count(name), code, from;
    if (!strcmp(name, "nvmlDeviceGetUtilizationRates")) looks = calls;
    char which[80], whose[8];
    for (const char *at = getenv("NVML_STUB_FAIL"); at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (sscanf(at, "%79[^/]/%7[^:]:%d@%d", which, whose, &code, &from) == 4
            && ((!strcmp(which, "*") && looks >= from) || (!strcmp(which, name) && calls >= from)) && (!strcmp(whose, "*") || atoi(whose) == gpu))
            return code;
    return gpu == 2 ? LOST : SUCCESS;
}

#define ENTER(gpu) do { int failure = enter(__func__, gpu); if (failure) return failure; } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (variation("hang")) sleep(60);
    return variation("no_module") ? NOT_LOADED : SUCCESS;
}

int nvmlShutdown(void) {
    const char *path = getenv("NVML_STUB_REPORT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "{\"allocated\": %d, \"freed\": %d, \"windows\": %d, \"shortest_s\": %f, \"listening\": %d", allocated,
                freed, windows, shortest_s, listening);
        for (Counter *counter = counters; counter->calls; counter++)
            fprintf(file, ", \"%s\": %d", counter->name, counter->calls);
        fprintf(file, "}");
        fclose(file);
    }
    return SUCCESS;
}

const char *nvmlErrorString(int result) { (void)result; return "stub error"; }

int nvmlDeviceGetCount_v2(unsigned *found) { *found = variation("no_gpu") ? 0 : 3; return SUCCESS; }

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

int nvmlDeviceGetGpuInstanceId(Device *slice, unsigned *id) { ENTER(slice->index); *id = 7; return SUCCESS; }

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    ENTER(device->index);
    if (variation("no_rates")) return NOT_SUPPORTED;
    if (variation("crash")) abort();
    rates->gpu = device->index ? 40 : 90;
    rates->memory = 10;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory *memory) {
    ENTER(device->index);
    memory->total = 80000000000ull;
    memory->reserved = 500000000ull;
    memory->used = device->index ? 1000000000ull : 6000000000ull;
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMaxClockInfo(Device *device, int type, unsigned *mhz) {
    ENTER(device->index);
    *mhz = type == 1 ? 1980 : 0;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Device *device, int type, unsigned *mhz) {
    ENTER(device->index);
    if (type == 2 && variation("no_memory_clock")) return NOT_SUPPORTED;
    *mhz = type == 1 ? 1400 : type == 2 ? 2600 : 0;
    return SUCCESS;
}

/* GPU 0 is at its power limit, and idle besides. GPU 1 knows reasons by the older name only, and has none. */
int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *bits) {
    ENTER(device->index);
    if (device->index) return NOT_SUPPORTED;
    *bits = 0x4 | 0x1;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *bits) {
    ENTER(device->index);
    *bits = 0;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *degrees) {
    ENTER(device->index);
    *degrees = sensor == 0 ? 61 : 0;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned *mw) { ENTER(device->index); *mw = 350500; return SUCCESS; }

int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *mw) {
    ENTER(device->index);
    *mw = 700000;
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *mj) {
    ENTER(device->index);
    *mj = 1234500;
    return SUCCESS;
}

/* 1 and 2 MB/s over PCIe, 3000 and 4000 KiB/s over NVLink, whose counters are meant for all links together. */
int nvmlDeviceGetFieldValues(Device *device, int fields, Field *values) {
    ENTER(device->index);
    double at_s = now_s();
    for (int i = 0; i < fields; i++) {
        unsigned id = values[i].id, pcie = id == 197 || id == 198;
        double per_s = id == 197 ? 1e6 : id == 198 ? 2e6 : id == 138 ? 3000 : 4000;
        values[i].result = pcie ? (variation("no_counters") ? NOT_SUPPORTED : SUCCESS)
                                : (values[i].scope == 0xFFFFFFFF ? SUCCESS : INVALID);
        values[i].kind = 3;
        values[i].value = (unsigned long long)(at_s * per_s);
    }
    return SUCCESS;
}

int nvmlDeviceGetPcieThroughput(Device *device, int way, unsigned *kib_per_s) {
    ENTER(device->index);
    *kib_per_s = way ? 600 : 500;
    return SUCCESS;
}

int nvmlEventSetCreate(int **set) { ENTER(-1); *set = &listening; listening++; return SUCCESS; }

int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, int *set) {
    ENTER(device->index);
    return types == 8 && set == &listening ? SUCCESS : INVALID;
}

int nvmlEventSetWait_v2(int *set, Event *event, unsigned timeout_ms) {
    ENTER(-1);
    if (set != &listening || timeout_ms || !waiting || !variation("xid")) return TIMED_OUT;
    waiting = 0;
    event->device = &devices[0];
    event->type = 8;
    event->data = 79;
    return SUCCESS;
}

int nvmlEventSetFree(int *set) { ENTER(-1); if (set == &listening) listening--; return SUCCESS; }

int nvmlGpmQueryDeviceSupport(Device *device, Support *support) {
    ENTER(device->index);
    support->supported = device->index == 0;
    return SUCCESS;
}

int nvmlGpmSampleAlloc(Sample **sample) {
    ENTER(-1);
    *sample = calloc(1, sizeof(Sample));
    allocated++;
    return SUCCESS;
}

int nvmlGpmSampleFree(Sample *sample) { free(sample); freed++; return SUCCESS; }

int nvmlGpmSampleGet(Device *device, Sample *sample) {
    ENTER(device->index);
    if (variation("no_sample")) return NOT_SUPPORTED;
    sample->taken_s = now_s();
    return SUCCESS;
}

int nvmlGpmMigSampleGet(Device *device, unsigned instance, Sample *sample) {
    return instance == 7 ? nvmlGpmSampleGet(device, sample) : INVALID;
}

static double metric(unsigned id) {
    switch (id) {
    case 1: return variation("idle") ? 0.0 : 80.0;
    case 2: return 70.0;
    case 3: return variation("idle") ? 0.0 : 20.0;
    case 5: return variation("odd") ? 0.0 / 0.0 : 25.0;
    case 10: return 50.0;
    case 20: return 10.0;
    case 21: return 20.0;
    case 60: return 40.0;
    case 61: return 30.0;
    default: return -1.0;
    }
}

int nvmlGpmMetricsGet(Request *request) {
    ENTER(-1);
    if (variation("no_metrics")) return NOT_SUPPORTED;
    double window_s = request->second->taken_s - request->first->taken_s;
    if (window_s < shortest_s) shortest_s = window_s;
    windows++;
    for (unsigned i = 0; i < request->count; i++) {
        Metric *asked = &request->metrics[i];
        asked->value = metric(asked->id);
        asked->result = asked->value < 0 ? INVALID : SUCCESS;
        if (asked->id == 10 && variation("odd")) asked->result = NOT_SUPPORTED;
    }
    return SUCCESS;
}
