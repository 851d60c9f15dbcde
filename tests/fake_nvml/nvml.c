/* A stand-in for libnvidia-ml.so.1: the functions and structs of NVML that the router calls, over GPUs that a test
 * describes in a file. The file named by PLAYED_NVML is read anew at every call. Fields are separated by tabs:
 *
 *   gpu      UUID  NAME  TOTAL  USED  RESERVED  UTILIZATION  TEMPERATURE  POWER  LIMIT  MIG     (MiB, %, C, W, 0|1)
 *   part     GPU   UUID  NAME  TOTAL  USED                      a MIG device of the GPU with that index
 *   process  GPU   PID   MIB  compute|graphics                  MIB -1: the driver does not tell
 *   fault    FUNCTION|*  GPU|*  CODE                            what it returns instead
 *   hang     FUNCTION|*  GPU|*                                  it returns when this line is gone
 *   driver   N                                                  a change is a reload: initialize again
 *   engines                                                     see held_by_engines()
 *
 * NVML's interface: https://docs.nvidia.com/deploy/nvml-api/
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MOST = 64, FIELDS = 12, MEMORY_V2 = 0x02000028 };
#define MIB (1ull << 20)

typedef struct { uint64_t total, free, used; } memory_v1;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } memory_v2;
typedef struct { uint32_t pid; uint64_t used; uint32_t gpu_instance, compute_instance; } process;
typedef struct { uint32_t gpu, memory; } utilization;
typedef intptr_t device; /* 1000 * (index of the GPU + 1) + (0, or place of the part + 1) */

typedef struct { char text[1024]; char *field[FIELDS]; } line;
static __thread line lines[MOST];
static __thread int line_count;
static int is_initialized;
static long driver_at_start;

static void read_world(void) {
    const char *path = getenv("PLAYED_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    line_count = 0;
    while (file && line_count < MOST && fgets(lines[line_count].text, sizeof lines[0].text, file)) {
        line *now = &lines[line_count++];
        char *rest = now->text;
        now->text[strcspn(now->text, "\n")] = 0;
        for (int i = 0; i < FIELDS; i++) now->field[i] = rest ? strsep(&rest, "\t") : "";
    }
    if (file) fclose(file);
}

/* The nth line of a kind whose first field is `first` (NULL: any). */
static line *find(const char *kind, const char *first, int n) {
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].field[0], kind) && (!first || !strcmp(lines[i].field[1], first)) && !n--) return &lines[i];
    return NULL;
}

static line *gpu_of(device handle) { return find("gpu", NULL, (int)(handle / 1000) - 1); }

static line *part_of(device handle) {
    char index[16];
    snprintf(index, sizeof index, "%d", (int)(handle / 1000) - 1);
    return handle % 1000 ? find("part", index, (int)(handle % 1000) - 1) : NULL;
}

static int matches(const line *now, const char *function, int gpu) {
    return (!strcmp(now->field[1], "*") || !strcmp(now->field[1], function)) &&
           (!strcmp(now->field[2], "*") || atoi(now->field[2]) == gpu);
}

/* Every call begins here. `gpu` is -1 where it is about none. */
static int enter(const char *function, int gpu) {
again:
    read_world();
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].field[0], "hang") && matches(&lines[i], function, gpu)) {
            usleep(5000);
            goto again;
        }
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].field[0], "fault") && matches(&lines[i], function, gpu)) return atoi(lines[i].field[3]);
    line *driver = find("driver", NULL, 0);
    long number = driver ? atol(driver->field[1]) : 0;
    if (!strcmp(function, "nvmlInitWithFlags")) {
        is_initialized = 1;
        driver_at_start = number;
        return SUCCESS;
    }
    if (!is_initialized || number != driver_at_start) return UNINITIALIZED;
    return gpu >= 0 && !find("gpu", NULL, gpu) ? INVALID_ARGUMENT : SUCCESS;
}

#define ENTER(gpu)                               \
    do {                                         \
        int code = enter(__func__, (int)(gpu));  \
        if (code) return code;                   \
    } while (0)
#define ENTER_DEVICE(handle) ENTER((handle) / 1000 - 1)

/* With a line `engines`, a process that is shown a GPU by its CUDA_VISIBLE_DEVICES holds of it what it holds of RAM,
 * in equal shares if it is shown several. So an engine on the CPU plays one on GPUs. */
static uint64_t held_by_engine(int pid, const char *uuid) {
    char path[64], environ[65536];
    snprintf(path, sizeof path, "/proc/%d/environ", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t size = fread(environ, 1, sizeof environ - 1, file);
    fclose(file);
    environ[size] = 0;
    int shares = 0;
    for (char *entry = environ; entry < environ + size; entry += strlen(entry) + 1) {
        if (strncmp(entry, "CUDA_VISIBLE_DEVICES=", 21) || !strstr(entry, uuid)) continue;
        shares = 1;
        for (char *c = entry; *c; c++) shares += *c == ',';
    }
    if (!shares) return 0;
    unsigned long pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", pid);
    if ((file = fopen(path, "r"))) {
        if (fscanf(file, "%*u %lu", &pages) != 1) pages = 0;
        fclose(file);
    }
    return pages * (uint64_t)sysconf(_SC_PAGESIZE) / shares;
}

static int list_processes(device handle, const char *kind, process *into, unsigned most) {
    unsigned count = 0;
    char index[16];
    line *gpu = gpu_of(handle), *now;
    snprintf(index, sizeof index, "%d", (int)(handle / 1000) - 1);
    for (int n = 0; (now = find("process", index, n)); n++) {
        if (strcmp(now->field[4], kind)) continue;
        long mib = atol(now->field[3]);
        if (count < most) into[count] = (process){(uint32_t)atol(now->field[2]), mib < 0 ? ~0ull : mib * MIB, 0, 0};
        count++;
    }
    if (!find("engines", NULL, 0) || strcmp(kind, "compute")) return count;
    DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc));) {
        uint64_t held = isdigit(entry->d_name[0]) ? held_by_engine(atoi(entry->d_name), gpu->field[1]) : 0;
        if (!held) continue;
        if (count < most) into[count] = (process){(uint32_t)atol(entry->d_name), held, 0, 0};
        count++;
    }
    if (proc) closedir(proc);
    return count;
}

static uint64_t used(device handle) {
    static __thread process engines[1024];
    line *part = part_of(handle), *gpu = gpu_of(handle);
    uint64_t total = atol(part ? part->field[5] : gpu->field[4]) * MIB;
    if (!part && find("engines", NULL, 0)) {
        int count = list_processes(handle, "compute", engines, 1024);
        for (int i = 0; i < count && i < 1024; i++) total += engines[i].used == ~0ull ? 0 : engines[i].used;
    }
    return total;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; ENTER(-1); return SUCCESS; }
int nvmlShutdown(void) { ENTER(-1); is_initialized = 0; return SUCCESS; }
const char *nvmlErrorString(int code) { return code == 999 ? "Unknown Error" : "Played Error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(-1);
    for (*count = 0; find("gpu", NULL, (int)*count);) ++*count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *handle) {
    ENTER(index);
    *handle = 1000 * ((device)index + 1);
    return SUCCESS;
}

static int copy(const char *text, char *into, unsigned size) {
    return snprintf(into, size, "%s", text) < (int)size ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetUUID(device handle, char *into, unsigned size) {
    ENTER_DEVICE(handle);
    line *part = part_of(handle);
    return copy(part ? part->field[2] : gpu_of(handle)->field[1], into, size);
}

int nvmlDeviceGetName(device handle, char *into, unsigned size) {
    ENTER_DEVICE(handle);
    line *part = part_of(handle);
    return copy(part ? part->field[3] : gpu_of(handle)->field[2], into, size);
}

int nvmlDeviceGetMemoryInfo(device handle, memory_v1 *into) {
    ENTER_DEVICE(handle);
    line *part = part_of(handle), *gpu = gpu_of(handle);
    uint64_t total = atol(part ? part->field[4] : gpu->field[3]) * MIB, held = used(handle);
    held += part ? 0 : atol(gpu->field[5]) * MIB; /* this version counts what the driver reserves as used */
    if (held > total) held = total;
    *into = (memory_v1){total, total - held, held};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(device handle, memory_v2 *into) {
    ENTER_DEVICE(handle);
    if (into->version != MEMORY_V2) return 25; /* argument version mismatch */
    line *part = part_of(handle), *gpu = gpu_of(handle);
    uint64_t total = atol(part ? part->field[4] : gpu->field[3]) * MIB, held = used(handle);
    uint64_t reserved = part ? 0 : atol(gpu->field[5]) * MIB;
    if (held + reserved > total) held = total - reserved;
    *into = (memory_v2){MEMORY_V2, total, reserved, total - held - reserved, held};
    return SUCCESS;
}

static int processes(device handle, const char *kind, unsigned *count, process *into) {
    unsigned found = list_processes(handle, kind, into, into ? *count : 0), most = *count;
    *count = found;
    return found > (into ? most : 0) ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(name, kind)                                                          \
    int name(device handle, unsigned *count, process *into) {                          \
        ENTER_DEVICE(handle);                                                          \
        return processes(handle, kind, count, into);                                   \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")

int nvmlDeviceGetUtilizationRates(device handle, utilization *into) {
    ENTER_DEVICE(handle);
    if (handle % 1000) return NOT_SUPPORTED; /* of a part */
    *into = (utilization){(uint32_t)atol(gpu_of(handle)->field[6]), 0};
    return SUCCESS;
}

#define FIGURE(name, place, scale)                                                     \
    int name(device handle, unsigned *into) {                                          \
        ENTER_DEVICE(handle);                                                          \
        if (handle % 1000) return NOT_SUPPORTED;                                       \
        *into = (unsigned)atol(gpu_of(handle)->field[place]) * (scale);                \
        return SUCCESS;                                                                \
    }
FIGURE(nvmlDeviceGetPowerUsage, 8, 1000)
FIGURE(nvmlDeviceGetEnforcedPowerLimit, 9, 1000)

int nvmlDeviceGetTemperature(device handle, int sensor, unsigned *into) {
    ENTER_DEVICE(handle);
    if (handle % 1000 || sensor) return NOT_SUPPORTED;
    *into = (unsigned)atol(gpu_of(handle)->field[7]);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(device handle, unsigned *current, unsigned *pending) {
    ENTER_DEVICE(handle);
    *current = *pending = (unsigned)atol(gpu_of(handle)->field[10]);
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(device handle, unsigned *count) {
    ENTER_DEVICE(handle);
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device handle, unsigned place, device *part) {
    ENTER_DEVICE(handle);
    *part = handle + place + 1;
    return part_of(*part) ? SUCCESS : NOT_FOUND;
}
