/* A stand-in for NVIDIA's libnvidia-ml.so.1, so that the real pynvml sees GPUs that are not there.
 *
 * What it says stands in the file $NVML_STUB, which is looked at in each call, so that a test changes GPUs while
 * they are watched. Lines of that file:
 *
 *     count N                    GPUs there are
 *     init CODE                  what nvmlInit answers
 *     counting CODE              what nvmlDeviceGetCount answers
 *     waiting CODE               what nvmlEventSetWait answers
 *     delay_us N                 how long each call about a GPU takes; one of a second or more leaves a line in the file
 *                                $NVML_STUB.hung when it begins and when it is over
 *     replaced NS                the driver was replaced at this time: a library that was loaded before is of no use
 *     gpu I KEY VALUE            a figure of GPU I, or of all with *: util mem_util mem_used mem_total mem_reserved temp
 *                                mem_temp power_mw limit_mw energy_mj sm memclk reasons fan pstate pcie_gen pcie_width
 *                                pcie_tx pcie_rx nvlink_tx nvlink_rx replays ecc_c ecc_u rows_c rows_u mig mig_used gpm
 *                                (1 where GPM is there), gpm_ID (a value of it), mig_gpm_ID (of each MIG instance)
 *     gpu I error FUNCTION CODE  what a function answers for that GPU; * for all functions
 *     gpu I field ID CODE        what a field of nvmlDeviceGetFieldValues answers
 *     gpu I process PID BYTES    a process on that GPU
 *     gpu I xid CODE NUMBER      an XID; told once for each new NUMBER
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, TIMEOUT = 10 };
enum { MISMATCH = 18, UNKNOWN = 999 };
enum { MOST = 16, MOST_MIG = 7 };

typedef struct { int index, instance; } Device;
static Device gpus[MOST], instances[MOST][MOST_MIG];
static char text[65536];
static struct timespec seen;
static int refs;
static u64 xids_told[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void look(void) {
    const char *path = getenv("NVML_STUB");
    struct stat st;
    if (!path || stat(path, &st)) return;
    if (st.st_mtim.tv_sec == seen.tv_sec && st.st_mtim.tv_nsec == seen.tv_nsec) return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    size_t n = fread(text, 1, sizeof text - 1, file);
    text[n] = 0;
    fclose(file);
    seen = st.st_mtim;
}

/* The last line that fits; the words after the key are scanned by `format`. Callers hold the lock. */
static int find(const char *key, const char *format, void *a, void *b) {
    int found = 0;
    size_t length = strlen(key);
    for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (!strncmp(line, key, length) && line[length] == ' ' && sscanf(line + length, format, a, b) > 0) found = 1;
    return found;
}

static u64 global(const char *key, u64 otherwise) {
    u64 value = otherwise;
    pthread_mutex_lock(&lock);
    look();
    find(key, "%llu", &value, NULL);
    pthread_mutex_unlock(&lock);
    return value;
}

static u64 figure(const Device *it, const char *name, u64 otherwise) {
    u64 value = otherwise;
    char key[96];
    pthread_mutex_lock(&lock);
    look();
    snprintf(key, sizeof key, "gpu * %s", name);
    find(key, "%llu", &value, NULL);
    snprintf(key, sizeof key, "gpu %d %s", it->index, name);
    find(key, "%llu", &value, NULL);
    pthread_mutex_unlock(&lock);
    return value;
}

static u64 loaded;
__attribute__((constructor)) static void load(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    loaded = now.tv_sec * 1000000000ull + now.tv_nsec;
}
static int is_stale(void) { return loaded < global("replaced", 0); }

static void note(const char *what) {
    const char *path = getenv("NVML_STUB");
    char name[4096];
    snprintf(name, sizeof name, "%s.hung", path ? path : "");
    FILE *file = path ? fopen(name, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s\n", what);
    fclose(file);
}
static void take(u64 delay_us) {
    if (delay_us >= 1000000) note("begun");
    usleep(delay_us);
    if (delay_us >= 1000000) note("over");
}

static int fault(const Device *it, const char *function) {
    char name[80];
    u64 code;
    if (!refs) return UNINITIALIZED;
    if (is_stale()) return UNKNOWN;
    u64 delay = global("delay_us", 0);
    if (delay) take(delay);
    if (it->index >= (int)global("count", 0)) return INVALID;
    if ((code = figure(it, "error *", 0))) return (int)code;
    snprintf(name, sizeof name, "error %s", function);
    return (int)figure(it, name, 0);
}
#define ASK(it) { int code_ = fault(it, __func__); if (code_) return code_; }

static double since(void) {
    static struct timespec began;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!began.tv_sec) began = now;
    return now.tv_sec - began.tv_sec + (now.tv_nsec - began.tv_nsec) / 1e9;
}
static u64 energy(const Device *it) {
    return figure(it, "energy_mj", 5000000) + (u64)(figure(it, "power_mw", 300000) * since());
}

int nvmlInitWithFlags(u32 flags) {
    int code = (int)global("init", 0);
    if (code) return code;
    if (is_stale()) return MISMATCH;
    refs++;
    since();
    for (int i = 0; i < MOST; i++) {
        gpus[i] = (Device){i, -1};
        for (int j = 0; j < MOST_MIG; j++) instances[i][j] = (Device){i, j};
    }
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { if (!refs) return UNINITIALIZED; refs--; return OK; }
const char *nvmlErrorString(int code) {
    switch (code) {
        case 0: return "Success"; case 1: return "Uninitialized"; case 3: return "Not Supported";
        case 9: return "Driver Not Loaded"; case 13: return "Function Not Found"; case 15: return "GPU is lost";
        case 16: return "GPU requires reset"; case 18: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *out, u32 n) { snprintf(out, n, "575.00.00"); return OK; }
int nvmlSystemGetNVMLVersion(char *out, u32 n) { snprintf(out, n, "12.575.00"); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 12090; return OK; }
int nvmlSystemGetCudaDriverVersion(int *out) { *out = 12090; return OK; }
int nvmlDeviceGetCount_v2(u32 *out) {
    if (!refs) return UNINITIALIZED;
    *out = (u32)global("count", 0);
    return (int)global("counting", 0);
}
int nvmlDeviceGetHandleByIndex_v2(u32 i, Device **out) {
    if (!refs) return UNINITIALIZED;
    if (i >= global("count", 0) || i >= MOST) return INVALID;
    *out = &gpus[i];
    ASK(*out);
    return OK;
}
static void uuid_of(const Device *it, char *out, u32 n) {
    if (it->instance < 0) snprintf(out, n, "GPU-%08x-1111-2222-3333-444444444444", it->index + 0xa0);
    else snprintf(out, n, "MIG-%08x-1111-2222-3333-44444444%04x", it->index + 0xa0, it->instance);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **out) {
    char own[80];
    for (int i = 0; i < (int)global("count", 0) && i < MOST; i++) {
        uuid_of(&gpus[i], own, sizeof own);
        if (strcmp(own, uuid)) continue;
        *out = &gpus[i];
        ASK(*out)
        return OK;
    }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(const Device *it, char *out, u32 n) { ASK(it) uuid_of(it, out, n); return OK; }
int nvmlDeviceGetIndex(const Device *it, u32 *out) { ASK(it) *out = it->index; return OK; }
int nvmlDeviceGetName(const Device *it, char *out, u32 n) { ASK(it) snprintf(out, n, "NVIDIA Stub %d", it->index); return OK; }
int nvmlDeviceGetMinorNumber(const Device *it, u32 *out) { ASK(it) *out = it->index; return OK; }

typedef struct { u32 gpu, memory; } Utilization;
int nvmlDeviceGetUtilizationRates(const Device *it, Utilization *out) {
    ASK(it)
    *out = (Utilization){(u32)figure(it, "util", 50), (u32)figure(it, "mem_util", 20)};
    return OK;
}
static u64 used(const Device *it) {
    if (it->instance >= 0) return figure(it, "mig_used", 1ull << 30);
    return figure(it, "mem_used", 10ull << 30);
}
static u64 total(const Device *it) {
    u64 all = figure(it, "mem_total", 80ull << 30);
    return it->instance >= 0 ? all / MOST_MIG : all;
}
typedef struct { u64 total, free, used; } Memory;
int nvmlDeviceGetMemoryInfo(const Device *it, Memory *out) {
    ASK(it)
    *out = (Memory){total(it), total(it) - used(it), used(it)};
    return OK;
}
typedef struct { u32 version; u64 total, reserved, free, used; } Memory2;
int nvmlDeviceGetMemoryInfo_v2(const Device *it, Memory2 *out) {
    ASK(it)
    u64 reserved = figure(it, "mem_reserved", 512ull << 20);
    *out = (Memory2){out->version, total(it), reserved, total(it) - used(it) - reserved, used(it)};
    return OK;
}

#define FIGURE(function, type, name, otherwise) \
    int function(const Device *it, type *out) { ASK(it) *out = (type)figure(it, name, otherwise); return OK; }
FIGURE(nvmlDeviceGetPowerUsage, u32, "power_mw", 300000)
FIGURE(nvmlDeviceGetEnforcedPowerLimit, u32, "limit_mw", 700000)
FIGURE(nvmlDeviceGetPowerManagementLimit, u32, "limit_mw", 700000)
FIGURE(nvmlDeviceGetFanSpeed, u32, "fan", 30)
FIGURE(nvmlDeviceGetPerformanceState, u32, "pstate", 0)
FIGURE(nvmlDeviceGetCurrPcieLinkGeneration, u32, "pcie_gen", 5)
FIGURE(nvmlDeviceGetCurrPcieLinkWidth, u32, "pcie_width", 16)
FIGURE(nvmlDeviceGetCurrentClocksEventReasons, u64, "reasons", 0)
FIGURE(nvmlDeviceGetCurrentClocksThrottleReasons, u64, "reasons", 0)
int nvmlDeviceGetTotalEnergyConsumption(const Device *it, u64 *out) { ASK(it) *out = energy(it); return OK; }
int nvmlDeviceGetTemperature(const Device *it, u32 sensor, u32 *out) {
    ASK(it)
    *out = (u32)figure(it, "temp", 40);
    return OK;
}
int nvmlDeviceGetClockInfo(const Device *it, u32 type, u32 *out) {
    ASK(it)
    *out = (u32)(type == 2 ? figure(it, "memclk", 2600) : figure(it, "sm", 1980));
    return OK;
}
int nvmlDeviceGetTotalEccErrors(const Device *it, u32 kind, u32 counter, u64 *out) {
    ASK(it)
    *out = figure(it, kind ? "ecc_u" : "ecc_c", 0);
    return OK;
}
int nvmlDeviceGetRemappedRows(const Device *it, u32 *c, u32 *u, u32 *pending, u32 *failure) {
    ASK(it)
    *c = (u32)figure(it, "rows_c", 0);
    *u = (u32)figure(it, "rows_u", 0);
    *pending = *failure = 0;
    return OK;
}

typedef struct {
    u32 field, scope; long long timestamp, latency; u32 type; int code; union { double d; u32 ui; u64 ull; } value;
} Field;
int nvmlDeviceGetFieldValues(const Device *it, int count, Field *fields) {
    ASK(it)
    for (int i = 0; i < count; i++) {
        Field *field = &fields[i];
        char key[40];
        snprintf(key, sizeof key, "field %u", field->field);
        field->code = (int)figure(it, key, 0);
        field->type = 3;
        switch (field->field) {
            case 82: field->type = 1; field->value.ui = (u32)figure(it, "mem_temp", 50); break;
            case 83: field->value.ull = energy(it); break;
            case 94: field->value.ull = figure(it, "replays", 0); break;
            case 197: field->value.ull = figure(it, "pcie_tx", 0) + (u64)(1e6 * since()); break;
            case 198: field->value.ull = figure(it, "pcie_rx", 0) + (u64)(2e6 * since()); break;
            case 138: field->value.ull = figure(it, "nvlink_tx", 0) + (u64)(1e3 * since()); break;
            case 139: field->value.ull = figure(it, "nvlink_rx", 0) + (u64)(1e3 * since()); break;
            default: field->code = NOT_SUPPORTED;
        }
    }
    return OK;
}

typedef struct { u32 pid; u64 used; u32 gpu_instance, compute_instance; } Process;
static int processes(const Device *it, u32 *count, Process *out) {
    char key[40];
    u32 room = *count, found = 0;
    snprintf(key, sizeof key, "gpu %d process ", it->index);
    pthread_mutex_lock(&lock);
    look();
    for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        u32 pid;
        u64 bytes;
        if (strncmp(line, key, strlen(key)) || sscanf(line + strlen(key), "%u %llu", &pid, &bytes) != 2) continue;
        if (out && found < room) out[found] = (Process){pid, bytes, 0xFFFFFFFF, 0xFFFFFFFF};
        found++;
    }
    pthread_mutex_unlock(&lock);
    *count = found;
    return found && (!out || room < found) ? SMALL : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(const Device *it, u32 *count, Process *out) {
    ASK(it)
    return processes(it, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(const Device *it, u32 *count, Process *out) { ASK(it) *count = 0; return OK; }

int nvmlDeviceGetMigMode(const Device *it, u32 *current, u32 *pending) {
    ASK(it)
    *current = *pending = figure(it, "mig", 0) > 0;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(const Device *it, u32 *out) { ASK(it) *out = figure(it, "mig", 0) ? MOST_MIG : 0; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(const Device *it, u32 i, Device **out) {
    ASK(it)
    if (i >= figure(it, "mig", 0)) return NOT_FOUND;
    *out = &instances[it->index][i];
    return OK;
}
int nvmlDeviceGetGpuInstanceId(const Device *it, u32 *out) { ASK(it) *out = it->instance + 1; return OK; }
int nvmlDeviceGetComputeInstanceId(const Device *it, u32 *out) { ASK(it) *out = 0; return OK; }
int nvmlDeviceIsMigDeviceHandle(const Device *it, u32 *out) { ASK(it) *out = it->instance >= 0; return OK; }

typedef struct { int index, instance; } GpmSample;
typedef struct { u32 id; int code; double value; const char *names[3]; } GpmMetric;
typedef struct { u32 version, count; GpmSample *before, *after; GpmMetric metrics[]; } GpmQuestion;
typedef struct { u32 version, supported; } GpmSupport;
int nvmlGpmQueryDeviceSupport(const Device *it, GpmSupport *out) { ASK(it) out->supported = (u32)figure(it, "gpm", 1); return OK; }
int nvmlGpmSampleAlloc(GpmSample **out) { *out = calloc(1, sizeof **out); return OK; }
int nvmlGpmSampleFree(GpmSample *it) { free(it); return OK; }
int nvmlGpmSampleGet(const Device *it, GpmSample *out) { ASK(it) *out = (GpmSample){it->index, -1}; return OK; }
int nvmlGpmMigSampleGet(const Device *it, u32 instance, GpmSample *out) {
    ASK(it)
    *out = (GpmSample){it->index, (int)instance};
    return OK;
}
int nvmlGpmMetricsGet(GpmQuestion *it) {
    if (it->before->index != it->after->index || it->before->instance != it->after->instance) return INVALID;
    for (u32 i = 0; i < it->count; i++) {
        char key[40];
        u64 value = it->metrics[i].id;
        Device of = {it->after->index, it->after->instance};
        snprintf(key, sizeof key, "%sgpm_%u", of.instance < 0 ? "" : "mig_", it->metrics[i].id);
        it->metrics[i].value = (double)figure(&of, key, value);
        snprintf(key, sizeof key, "error gpm_%u", it->metrics[i].id);
        it->metrics[i].code = (int)figure(&of, key, 0);
    }
    return OK;
}

typedef struct { char legacy[16]; u32 domain, bus, device, pci, sub; char id[32]; } Pci;
int nvmlDeviceGetPciInfo_v3(const Device *it, Pci *out) {
    ASK(it)
    memset(out, 0, sizeof *out);
    out->bus = it->index + 1;
    snprintf(out->legacy, sizeof out->legacy, "0000:%02X:00.0", out->bus);
    snprintf(out->id, sizeof out->id, "00000000:%02X:00.0", out->bus);
    return OK;
}

typedef struct { Device *device; u64 type, data; u32 gpu_instance, compute_instance; } Event;
int nvmlEventSetCreate(void **out) { if (!refs) return UNINITIALIZED; *out = text; return OK; }
int nvmlEventSetFree(void *set) { return OK; }
int nvmlDeviceRegisterEvents(const Device *it, u64 types, void *set) { ASK(it) return OK; }
int nvmlEventSetWait_v2(void *set, Event *out, u32 timeout_ms) {
    for (u32 waited = 0;; waited += 10) {
        if (!refs) return UNINITIALIZED;
        if (global("waiting", 0)) return (int)global("waiting", 0);
        for (int i = 0; i < MOST; i++) {
            char key[40];
            u64 code = 0, number = 0;
            snprintf(key, sizeof key, "gpu %d xid", i);
            pthread_mutex_lock(&lock);
            look();
            int there = find(key, "%llu %llu", &code, &number);
            pthread_mutex_unlock(&lock);
            if (there && number > xids_told[i]) {
                xids_told[i] = number;
                *out = (Event){&gpus[i], 8, code, 0xFFFFFFFF, 0xFFFFFFFF};
                return OK;
            }
        }
        if (waited >= timeout_ms) return TIMEOUT;
        usleep(10000);
    }
}
