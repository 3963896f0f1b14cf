/* What is left of a machine's memory, and its memory nodes, read below a folder that stands for its root. */
#include "io/machine.h"

#include "scratch.h"

#define KIB UINT64_C(1024)

static char root[ESPI_PATH_MAX];

static void make_root(void) {
    scratch_make(root);
}
static void remove_root(void) {
    scratch_remove(root);
}

static void put(const char *file, const char *text) {
    scratch_put(root, file, text);
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

static void expect_nodes(int count, const char *of_processors) {
    unsigned char node[ESPI_MACHINE_PROCESSORS];
    const int got = espi_machine_nodes_read(node, root);
    cr_expect_eq(got, count, "%d nodes, expected %d", got, count);
    for (size_t p = 0; of_processors[p]; p++)
        cr_expect_eq(node[p], of_processors[p] - '0', "processor %zu is near node %d, expected %c", p, node[p], of_processors[p]);
}

Test(machine, nodes) {
    expect_nodes(1, "0000");
    put("sys/devices/system/node/has_cpu", "0\n");
    put("sys/devices/system/node/node0/cpulist", "0-7\n");
    expect_nodes(1, "00000000");
    put("sys/devices/system/node/has_cpu", "0-1\n");
    put("sys/devices/system/node/node0/cpulist", "0-2,6\n");
    put("sys/devices/system/node/node1/cpulist", "3-5,7,5000\n");
    expect_nodes(2, "00011101");
}

/* Numbers may be left out, and memory may have no processors near. */
Test(machine, nodes_here_and_there) {
    put("sys/devices/system/node/has_cpu", "1,4-5\n");
    put("sys/devices/system/node/node0/cpulist", "\n");
    put("sys/devices/system/node/node1/cpulist", "4\n");
    put("sys/devices/system/node/node4/cpulist", "0,2\n");
    put("sys/devices/system/node/node5/cpulist", "1,3\n");
    expect_nodes(3, "12120");
}

Test(machine, more_nodes_than_are_told_apart) {
    put("sys/devices/system/node/has_cpu", "0-17\n");
    for (int n = 0; n < 18; n++) {
        char file[80], list[16];
        snprintf(file, sizeof file, "sys/devices/system/node/node%d/cpulist", n);
        snprintf(list, sizeof list, "%d\n", n);
        put(file, list);
    }
    unsigned char node[ESPI_MACHINE_PROCESSORS];
    cr_expect_eq(espi_machine_nodes_read(node, root), ESPI_MACHINE_NODES);
    cr_expect(node[15] == 15 && node[16] == 0 && node[17] == 1, "%d %d %d", node[15], node[16], node[17]);
}
