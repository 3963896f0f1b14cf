/* The limits of memory that a machine and its control groups state, and its memory nodes.  None is an error to lack: other systems and other
 * containers have others. */
#include "io/machine.h"

#include "core/status.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = ESPI_PATH_MAX };

/* The files of a version of control groups. */
typedef struct group_files {
    const char *mount, *limit, *used, *inactive, *active;
} group_files;

static const group_files version_2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ", "active_file "},
                         version_1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ",
                                      "total_active_file "};

/* The number behind `key` at the beginning of a line; "" is that of the first. */
static bool read_number(uint64_t *value, const char *path, const char *key) {
    char line[LINE];
    bool found = false;
    FILE *f = fopen(path, "re");
    while (f && !found && fgets(line, sizeof line, f)) {
        if (strncmp(line, key, strlen(key)) == 0) found = sscanf(line + strlen(key), "%" SCNu64, value) == 1;
        if (!*key) break;
    }
    if (f) fclose(f);
    return found;
}

static void consider(espi_memory_left *left, uint64_t bytes, const char *source) {
    if (bytes >= left->bytes) return;
    left->bytes = bytes;
    snprintf(left->source, sizeof left->source, "%s", source);
}

/* What is cached of files is counted as used, but given up before anything fails. */
static void look_at_group(espi_memory_left *left, const char *folder, const group_files *files) {
    char path[ESPI_PATH_MAX], of_use[ESPI_PATH_MAX];
    uint64_t limit, used = 0, inactive = 0, active = 0;
    if (espi_path_join(path, folder, "memory.stat") != ESP_OK) return;
    if (!read_number(&inactive, path, files->inactive)) inactive = 0;
    if (!read_number(&active, path, files->active)) active = 0;
    if (espi_path_join(of_use, folder, files->used) != ESP_OK || espi_path_join(path, folder, files->limit) != ESP_OK) return;
    if (!read_number(&limit, path, "")) return; /* "max", or no such group */
    if (!read_number(&used, of_use, "")) used = 0;
    used = used > inactive + active ? used - inactive - active : 0;
    consider(left, limit > used ? limit - used : 0, path);
}

/* The group and those above it: each has a limit of its own. */
static void look_at_groups(espi_memory_left *left, const char *root, const char *group, const group_files *files) {
    char folder[ESPI_PATH_MAX];
    const size_t top = strlen(root) + strlen(files->mount);
    if (snprintf(folder, sizeof folder, "%s%s%s", root, files->mount, group) >= (int)sizeof folder) return;
    for (size_t n = strlen(folder); n >= top; n--) {
        if (folder[n] != '/' && folder[n] != 0) continue;
        folder[n] = 0;
        look_at_group(left, folder, files);
    }
}

/* A line of /proc/self/cgroup is NUMBER:CONTROLLERS:PATH; version 2 names no controllers. */
static void look_at_line(espi_memory_left *left, const char *root, char *line) {
    char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!group) return;
    *controllers++ = *group++ = 0;
    group[strcspn(group, "\n")] = 0;
    if (strcmp(group, "/") == 0 || strstr(group, "..")) group = ""; /* of the group that is mounted, or outside of what is */
    if (!*controllers) look_at_groups(left, root, group, &version_2);
    if (strcmp(controllers, "memory") == 0) look_at_groups(left, root, group, &version_1);
}

void espi_memory_left_read(espi_memory_left *left, const char *root) {
    char path[ESPI_PATH_MAX], line[LINE];
    uint64_t kilobytes;
    *left = (espi_memory_left){.bytes = UINT64_MAX};
    if (espi_path_join(path, root, "proc/meminfo") == ESP_OK && read_number(&kilobytes, path, "MemAvailable:"))
        consider(left, kilobytes * 1024, path);
    FILE *f = espi_path_join(path, root, "proc/self/cgroup") == ESP_OK ? fopen(path, "re") : NULL;
    while (f && fgets(line, sizeof line, f)) look_at_line(left, root, line);
    if (f) fclose(f);
}

/* The next range of a list such as "0-3,8": false at its end. */
static bool next_range(const char **list, long *first, long *last) {
    char *end;
    *first = *last = strtol(*list, &end, 10);
    if (end == *list) return false;
    if (*end == '-') *last = strtol(end + 1, &end, 10);
    *list = end + (*end == ',');
    return true;
}

static bool read_list(char list[LINE], const char *root, const char *folder, const char *file) {
    char path[ESPI_PATH_MAX], at[ESPI_PATH_MAX];
    if (espi_path_join(at, root, folder) != ESP_OK || espi_path_join(path, at, file) != ESP_OK) return false;
    FILE *f = fopen(path, "re");
    const bool found = f && fgets(list, LINE, f);
    if (f) fclose(f);
    return found;
}

int espi_machine_nodes_read(unsigned char node[ESPI_MACHINE_PROCESSORS], const char *root) {
    static const char folder[] = "sys/devices/system/node";
    char nodes[LINE], processors[LINE], file[64];
    const char *rest = nodes;
    int count = 0;
    memset(node, 0, ESPI_MACHINE_PROCESSORS);
    if (!read_list(nodes, root, folder, "has_cpu")) return 1;
    for (long first, last; next_range(&rest, &first, &last);) {
        for (long n = first; n <= last && count < ESPI_MACHINE_PROCESSORS; n++, count++) {
            snprintf(file, sizeof file, "node%ld/cpulist", n);
            const char *list = read_list(processors, root, folder, file) ? processors : "";
            for (long from, to; next_range(&list, &from, &to);)
                for (long p = from; p <= to && p < ESPI_MACHINE_PROCESSORS; p++)
                    if (p >= 0) node[p] = (unsigned char)(count % ESPI_MACHINE_NODES);
        }
    }
    return count < 1 ? 1 : count < ESPI_MACHINE_NODES ? count : ESPI_MACHINE_NODES;
}
