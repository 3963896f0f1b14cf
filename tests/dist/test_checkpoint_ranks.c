/* Checkpoints of several ranks: saved by any number of them, read by any other; interrupted anywhere, the old one is whole; damage, drift and
 * full disks are found and named by all ranks. */
#define _DEFAULT_SOURCE /* syscall */
#include "core/ctx.h"
#include "faulty_files.h"
#include "io/checkpoint.h"
#include "ranks.h"
#include "scratch.h"

#include <sys/wait.h>

enum { EXPERTS = 5, EACH = 7, DENSE = 33, ARRAYS = 6 };

/* What is saved: `version` is in every value. */
typedef struct content {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    int version;
    int drifting; /* the rank whose dense array is another; -1: none */
} content;

/* One rank's arrays: of experts as parameters and as 8-bit codes with block scales, a dense one, and two in host memory. */
typedef struct arrays {
    float experts[EXPERTS * EACH], dense[DENSE], scales[EXPERTS * 2];
    uint8_t codes[EXPERTS * 3];
    int64_t state[4];
    espi_saved_array list[ARRAYS];
    esp_ctx ctx; /* tensor memory that is host memory */
} arrays;

static double value_of(int version, int array, int64_t i) {
    return (double)((version * 31 + array * 7 + i * 3) % 251);
}

static void describe(arrays *a, const espi_share *s) {
    const int64_t n = s->count;
    const espi_saved_array list[ARRAYS] = {
        {"trainer/state", ESP_I64, 4, a->state, NULL, 0, 0},
        {"adapter/experts", ESP_F32, n * EACH, a->experts, &a->ctx, s->first * EACH, n ? EXPERTS * EACH : -1},
        {"adapter/dense", ESP_F32, DENSE, a->dense, &a->ctx, 0, 0},
        {"optimizer/codes", ESP_U8, n * 3, a->codes, &a->ctx, s->first * 3, n ? EXPERTS * 3 : -1},
        {"reference/scales", ESP_F32, n * 2, a->scales, NULL, s->first * 2, n ? EXPERTS * 2 : -1},
        {"trainer/none", ESP_I32, 0, NULL, NULL, 0, 0},
    };
    memcpy(a->list, list, sizeof list);
    a->ctx = (esp_ctx){0};
    if (n < EXPERTS) return;
    for (int i = 0; i < ARRAYS; i++) a->list[i].first = a->list[i].total = 0; /* as a rank with all experts says it */
}

static double get(const espi_saved_array *a, int64_t i) {
    switch (a->dtype) {
    case ESP_I64:
        return (double)((const int64_t *)a->data)[i];
    case ESP_U8:
        return ((const uint8_t *)a->data)[i];
    default:
        return ((const float *)a->data)[i];
    }
}

static void set(const espi_saved_array *a, int64_t i, double x) {
    if (a->dtype == ESP_I64)
        ((int64_t *)a->data)[i] = (int64_t)x;
    else if (a->dtype == ESP_U8)
        ((uint8_t *)a->data)[i] = (uint8_t)x;
    else
        ((float *)a->data)[i] = (float)x;
}

static esp_status share_of(espi_share *share, const rank_job *job) {
    return espi_share_make(share, job->comm, EXPERTS, job->spread, 0);
}

static esp_status save(rank_job *job) {
    const content *c = job->user;
    espi_share share;
    arrays a;
    ESPI_TRY(share_of(&share, job));
    describe(&a, &share);
    for (int k = 0; k < ARRAYS; k++)
        for (int64_t i = 0; i < a.list[k].count; i++) set(&a.list[k], i, value_of(c->version, k, a.list[k].first + i));
    if (c->drifting == job->rank) a.dense[DENSE - 1] += 1;
    return espi_checkpoint_write(c->path, a.list, ARRAYS, &share);
}

/* Reads what is this rank's: which version it is, the same in all values, goes to c->version where that is 0. */
static esp_status load(rank_job *job) {
    const content *c = job->user;
    espi_checkpoint *file;
    espi_share share;
    arrays a;
    ESPI_TRY(share_of(&share, job));
    describe(&a, &share);
    ESPI_TRY(espi_checkpoint_open(&file, c->path));
    const esp_status status = espi_checkpoint_read_all(file, a.list, ARRAYS);
    espi_checkpoint_close(file);
    for (int k = 0; k < ARRAYS && status == ESP_OK; k++)
        for (int64_t i = 0; i < a.list[k].count; i++) job->wrong += get(&a.list[k], i) != value_of(c->version, k, a.list[k].first + i);
    return status;
}

static void open_content(content *c) {
    *c = (content){.version = 1, .drifting = -1};
    scratch_make(c->dir);
    OK(espi_path_join(c->path, c->dir, "checkpoint.h5"));
}

/* Ranks, and over how many of them the experts are spread; more ranks than experts, too. */
static const int cuts[][2] = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {4, 2}, {3, 1}, {8, 8}};
enum { CUTS = sizeof cuts / sizeof *cuts };

/* Saved by one cut into the folder of the one before, read by every cut. */
Test(checkpoint_ranks, any_number_reads_what_any_number_wrote) {
    content c;
    open_content(&c);
    for (int n = 0; n < CUTS; n++) {
        c.version = n + 1;
        ranks_well(cuts[n][0], cuts[n][1], save, &c, "saving");
        cr_assert_eq(scratch_count(c.dir), cuts[n][0] > 1 ? cuts[n][0] + 1 : 1, "%d files of %d ranks", scratch_count(c.dir), cuts[n][0]);
        for (int m = 0; m < CUTS; m++) ranks_well(cuts[m][0], cuts[m][1], load, &c, "reading");
    }
    scratch_remove(c.dir);
}

/* The same values are the same files, so a save that is repeated writes over nothing but them. */
Test(checkpoint_ranks, bytes_do_not_depend_on_the_hour) {
    content c;
    char *text[2], path[ESPI_PATH_MAX];
    size_t bytes[2];
    open_content(&c);
    for (int i = 0; i < 2; i++) {
        ranks_well(2, 2, save, &c, "saving");
        OK(espi_file_read_all(&text[i], &bytes[i], c.path, (size_t)1 << 24));
        if (i == 0) sleep(1); /* a second is what HDF5 would note */
    }
    cr_expect(bytes[0] == bytes[1] && memcmp(text[0], text[1], bytes[0]) == 0);
    cr_expect_eq(scratch_count(c.dir), 3);
    free(text[0]);
    free(text[1]);
    /* Kept under another name: its parts stay until it goes. */
    OK(espi_path_join(path, c.dir, "checkpoint-1.h5"));
    OK(espi_file_copy(path, c.path));
    c.version = 2;
    ranks_well(3, 3, save, &c, "saving");
    cr_expect_eq(scratch_count(c.dir), 2 + 2 + 3);
    content kept = {.version = 1};
    memcpy(kept.path, path, sizeof path);
    ranks_well(4, 4, load, &kept, "the kept one");
    espi_checkpoint_remove(path);
    cr_expect_eq(scratch_count(c.dir), 1 + 3);
    ranks_well(4, 4, load, &c, "the new one");
    scratch_remove(c.dir);
}

static int version_there(content *c, const char *what) {
    for (c->version = 1; c->version <= 2; c->version++) {
        rank_job jobs[2];
        ranks_run(jobs, 2, 2, load, c);
        for (int r = 0; r < 2; r++) cr_assert_eq(jobs[r].status, ESP_OK, "%s: %s", what, jobs[r].sentence);
        if (jobs[0].wrong == 0 && jobs[1].wrong == 0) return c->version;
    }
    cr_assert_fail("%s: neither the old nor the new one", what);
    return 0;
}

/* Killed at every call that changes a file, over a checkpoint of any form: the old one, or the new one, whole. */
static void kill_everywhere(int old_ranks, int new_ranks) {
    content c;
    bool done = false;
    int kills = 0, news = 0;
    open_content(&c);
    for (int at = 1; !done; at++) {
        char what[80];
        snprintf(what, sizeof what, "%d over %d ranks, killed at call %d", new_ranks, old_ranks, at);
        c.version = 1;
        ranks_well(old_ranks, old_ranks, save, &c, what);
        const pid_t child = fork();
        if (child == 0) {
            rank_job jobs[RANKS_MOST];
            c.version = 2;
            fault_set(at, true);
            ranks_run(jobs, new_ranks, new_ranks, save, &c);
            _exit(jobs[0].status == ESP_OK ? 0 : 1);
        }
        int how;
        cr_assert_eq(waitpid(child, &how, 0), child);
        done = WIFEXITED(how);
        cr_assert(!done || WEXITSTATUS(how) == 0, "%s: not saved", what);
        const int version = version_there(&c, what);
        cr_assert(!done || version == 2, "%s", what);
        kills += !done;
        news += !done && version == 2;
    }
    /* A write, two flushes and a renaming of every file, at least; the new one is there before its folder's last flush. */
    cr_assert_geq(kills, 4 * (new_ranks > 1 ? new_ranks + 1 : 1), "%d kills", kills);
    cr_assert(news >= 1 && news <= 2, "%d", news);
    c.version = 2;
    ranks_well(new_ranks, new_ranks, save, &c, "after all");
    cr_assert_eq(scratch_count(c.dir) > new_ranks, true);
    scratch_remove(c.dir);
}

Test(checkpoint_ranks, killed_at_every_boundary) {
    kill_everywhere(2, 3);
    kill_everywhere(1, 2);
    kill_everywhere(3, 1);
}

Test(checkpoint_ranks, a_full_disk_is_everybodys) {
    content c;
    open_content(&c);
    ranks_well(2, 2, save, &c, "before");
    for (int at = 1; at <= 12; at++) {
        c.version = 2;
        fault_set(at, false);
        ranks_fail(3, 3, save, &c, ESP_ERR_IO, "No space left");
        fault_set(0, false);
        cr_assert(version_there(&c, "full disk") == 1 || at > 12);
    }
    scratch_remove(c.dir);
}

/* What should be the same everywhere is compared before anything is written. */
Test(checkpoint_ranks, drift_is_named) {
    content c;
    open_content(&c);
    ranks_well(3, 3, save, &c, "before");
    const int files = scratch_count(c.dir);
    c.version = 2;
    c.drifting = 2;
    ranks_fail(3, 3, save, &c, ESP_ERR_MISMATCH, "array \"adapter/dense\": ranks 0 and 2 hold different values");
    cr_expect_eq(scratch_count(c.dir), files);
    cr_expect_eq(version_there(&c, "drift"), 1);
    scratch_remove(c.dir);
}

/* Experts that two ranks hold, and one has them wrong. */
static esp_status save_drifting_expert(rank_job *job) {
    const content *c = job->user;
    espi_share share;
    arrays a;
    ESPI_TRY(share_of(&share, job));
    describe(&a, &share);
    for (int k = 0; k < ARRAYS; k++)
        for (int64_t i = 0; i < a.list[k].count; i++) set(&a.list[k], i, value_of(c->version, k, a.list[k].first + i));
    if (job->rank == 3) a.codes[0] ^= 1;
    return espi_checkpoint_write(c->path, a.list, ARRAYS, &share);
}

Test(checkpoint_ranks, drift_of_copies_is_named) {
    content c;
    open_content(&c);
    ranks_fail(4, 2, save_drifting_expert, &c, ESP_ERR_MISMATCH, "array \"optimizer/codes\": ranks 1 and 3 hold different values");
    cr_expect_eq(scratch_count(c.dir), 0);
    scratch_remove(c.dir);
}

/* The part of rank r, by its name. */
static void part_path(char path[ESPI_PATH_MAX], const content *c, int r) {
    char end[16];
    DIR *d = opendir(c->dir);
    snprintf(end, sizeof end, "-%d.h5", r);
    *path = '\0';
    for (struct dirent *e; (e = readdir(d));)
        if (strncmp(e->d_name, "part-", 5) == 0 && strcmp(e->d_name + 21, end) == 0) OK(espi_path_join(path, c->dir, e->d_name));
    closedir(d);
    cr_assert_str_not_empty(path);
}

static void expect_refused(content *c, esp_status status, const char *words) {
    rank_job job;
    ranks_run(&job, 1, 1, load, c);
    cr_assert_eq(job.status, status, "%s: %s", esp_status_name(job.status), job.sentence);
    cr_assert_not_null(strstr(job.sentence, words), "no %s in %s", words, job.sentence);
}

Test(checkpoint_ranks, damaged_parts_are_named) {
    content c;
    char path[ESPI_PATH_MAX], *bytes, *older;
    size_t n, n_older;
    open_content(&c);
    ranks_well(3, 3, save, &c, "before");
    part_path(path, &c, 1);
    OK(espi_file_read_all(&older, &n_older, path, (size_t)1 << 24));
    c.version = 2;
    ranks_well(3, 3, save, &c, "before");
    for (int r = 0; r < 3; r++) {
        part_path(path, &c, r);
        const char *name = strrchr(path, '/') + 1;
        OK(espi_file_read_all(&bytes, &n, path, (size_t)1 << 24));
        for (size_t at = 0; at < n; at += n / 5) {
            bytes[at] ^= 1;
            OK(espi_file_write_atomic(path, bytes, n));
            expect_refused(&c, ESP_ERR_FORMAT, name);
            bytes[at] ^= 1;
        }
        for (size_t length = 0; length < n; length += n / 3) {
            OK(espi_file_write_atomic(path, bytes, length));
            expect_refused(&c, ESP_ERR_FORMAT, name);
        }
        OK(espi_file_write_atomic(path, older, n_older));
        expect_refused(&c, ESP_ERR_FORMAT, "it is of another save");
        espi_file_remove(path);
        expect_refused(&c, ESP_ERR_IO, name);
        OK(espi_file_write_atomic(path, bytes, n));
        ranks_well(2, 2, load, &c, "mended");
        free(bytes);
    }
    free(older);
    scratch_remove(c.dir);
}
