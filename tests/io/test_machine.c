/* What is left of a machine's memory, read below a folder that stands for its root. */
#include "io/machine.h"

#include "scratch.h"

#include <sys/stat.h>

#define KIB UINT64_C(1024)

static char root[ESPI_PATH_MAX];

static void make_root(void) {
    scratch_make(root);
}
static void remove_root(void) {
    scratch_remove(root);
}

/* A file below the root, with the folders that lead to it. */
static void put(const char *file, const char *text) {
    char path[ESPI_PATH_MAX];
    OK(espi_path_join(path, root, file));
    for (char *p = path + strlen(root) + 1; (p = strchr(p, '/')) != NULL; p++) {
        *p = 0;
        (void)mkdir(path, 0700);
        *p = '/';
    }
    scratch_write(path, root, file, text, strlen(text));
}

static void expect_left(uint64_t bytes, const char *file) {
    char path[ESPI_PATH_MAX] = "";
    espi_memory_left left;
    espi_memory_left_read(&left, root);
    if (file) OK(espi_path_join(path, root, file));
    cr_expect_eq(left.bytes, bytes, "%llu bytes, expected %llu", (unsigned long long)left.bytes, (unsigned long long)bytes);
    cr_expect_str_eq(left.source, path);
}

static void put_available(const char *kilobytes) {
    char text[200];
    snprintf(text, sizeof text, "MemTotal:       64000000 kB\nMemFree:         1000 kB\nMemAvailable:   %s kB\nBuffers: 3 kB\n", kilobytes);
    put("proc/meminfo", text);
}

TestSuite(machine, .init = make_root, .fini = remove_root);

Test(machine, nothing_is_stated) {
    expect_left(UINT64_MAX, NULL);
    put("proc/meminfo", "MemTotal: 64000000 kB\n");
    put("proc/self/cgroup", "no line of it\n");
    expect_left(UINT64_MAX, NULL);
}

Test(machine, what_is_available) {
    put_available("5000");
    expect_left(5000 * KIB, "proc/meminfo");
    put("proc/self/cgroup", "0::/\n");
    put("sys/fs/cgroup/memory.max", "max\n");
    put("sys/fs/cgroup/memory.current", "123456789\n");
    expect_left(5000 * KIB, "proc/meminfo");
}

/* What files have in the cache is given up first. */
Test(machine, a_group) {
    put_available("5000");
    put("proc/self/cgroup", "0::/\n");
    put("sys/fs/cgroup/memory.max", "3000000\n");
    put("sys/fs/cgroup/memory.current", "2500000\n");
    expect_left(500000, "sys/fs/cgroup/memory.max");
    put("sys/fs/cgroup/memory.stat", "anon 1400000\nfile 1100000\ninactive_anon 3\ninactive_file 600000\nactive_file 400000\n");
    expect_left(1500000, "sys/fs/cgroup/memory.max");
    put("sys/fs/cgroup/memory.current", "4000001\n");
    expect_left(0, "sys/fs/cgroup/memory.max");
}

/* A limit of a group above holds too, though it is larger: more of it may be used. */
Test(machine, groups_above) {
    put_available("5000");
    put("proc/self/cgroup", "0::/jobs/seven\n");
    put("sys/fs/cgroup/jobs/seven/memory.max", "3000000\n");
    put("sys/fs/cgroup/jobs/seven/memory.current", "1000000\n");
    put("sys/fs/cgroup/jobs/memory.max", "4000000\n");
    put("sys/fs/cgroup/jobs/memory.current", "1500000\n");
    expect_left(2000000, "sys/fs/cgroup/jobs/seven/memory.max");
    put("sys/fs/cgroup/jobs/memory.current", "3900000\n");
    expect_left(100000, "sys/fs/cgroup/jobs/memory.max");
    put("sys/fs/cgroup/memory.max", "50000\n");
    expect_left(50000, "sys/fs/cgroup/memory.max");
}

Test(machine, version_1) {
    put_available("5000");
    put("proc/self/cgroup", "12:cpu,cpuacct:/a\n4:memory:/docker/f00\n0::/ignored\n");
    put("sys/fs/cgroup/memory/docker/f00/memory.limit_in_bytes", "3000000\n");
    put("sys/fs/cgroup/memory/docker/f00/memory.usage_in_bytes", "2000000\n");
    put("sys/fs/cgroup/memory/docker/f00/memory.stat", "inactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    expect_left(1150000, "sys/fs/cgroup/memory/docker/f00/memory.limit_in_bytes");
}

/* A container sees its own group where others see that of the machine; and it may be told a path from outside. */
Test(machine, a_group_that_is_not_seen) {
    put_available("5000");
    put("sys/fs/cgroup/memory.max", "3000000\n");
    put("proc/self/cgroup", "0::/docker/f00\n");
    expect_left(3000000, "sys/fs/cgroup/memory.max");
    put("proc/self/cgroup", "0::/../../other\n");
    expect_left(3000000, "sys/fs/cgroup/memory.max");
}
