/* A checkpoint that is damaged, or that the disk or the system interrupts: refused whole, and the old one survives. */
#include "demo.h"
#include "io/checkpoint.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

static void write_values(const char *path, double value, int64_t n, esp_status expected) {
    double *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = value;
    const espi_saved_array arrays[] = {{"a/values", ESP_F64, n, x}, {"a/none", ESP_I32, 0, NULL}};
    const esp_status got = espi_checkpoint_write(path, arrays, 2, NULL);
    free(x);
    cr_assert_eq(got, expected, "%s: %s", esp_status_name(got), esp_last_error());
}

static double read_first(const char *path, int64_t n) {
    espi_checkpoint *c;
    double *x = malloc((size_t)n * sizeof *x);
    OK(espi_checkpoint_open(&c, path));
    OK(espi_checkpoint_read(c, &(espi_saved_array){"a/values", ESP_F64, n, x}));
    const double first = x[0];
    for (int64_t i = 0; i < n; i++) cr_assert_eq(x[i], first);
    espi_checkpoint_close(c);
    free(x);
    return first;
}

Test(checkpoint, gives_back_what_it_was_given) {
    char path[256];
    espi_checkpoint *c;
    int64_t count;
    demo_folder(path, "roundtrip.h5");
    write_values(path, 1.25, 1000, ESP_OK);
    cr_assert_eq(read_first(path, 1000), 1.25);
    OK(espi_checkpoint_open(&c, path));
    OK(espi_checkpoint_count(&count, c, "a/none", ESP_I32));
    cr_assert_eq(count, 0);
    FAILS(ESP_ERR_FORMAT, "no array \"a/other\"", espi_checkpoint_count(&count, c, "a/other", ESP_F64));
    FAILS(ESP_ERR_FORMAT, "another type, expected F32", espi_checkpoint_count(&count, c, "a/values", ESP_F32));
    double x[4];
    FAILS(ESP_ERR_FORMAT, "1000 values, expected 4", espi_checkpoint_read(c, &(espi_saved_array){"a/values", ESP_F64, 4, x}));
    espi_checkpoint_close(c);
    remove(path);
}

Test(checkpoint, damage_is_seen_wherever_it_is) {
    char path[256], *bytes;
    size_t n;
    espi_checkpoint *c;
    demo_folder(path, "damaged.h5");
    write_values(path, 3, 300, ESP_OK);
    OK(espi_file_read_all(&bytes, &n, path, (size_t)1 << 24));
    for (size_t at = 0; at < n; at += n / 37) {
        bytes[at] ^= 0x10;
        OK(espi_file_write_atomic(path, bytes, n));
        FAILS(ESP_ERR_FORMAT, "damaged.h5", espi_checkpoint_open(&c, path));
        bytes[at] ^= 0x10;
    }
    for (size_t length = 0; length < n; length += n / 11) {
        OK(espi_file_write_atomic(path, bytes, length));
        FAILS(ESP_ERR_FORMAT, "damaged.h5", espi_checkpoint_open(&c, path));
    }
    free(bytes);
    remove(path);
    FAILS(ESP_ERR_IO, "damaged.h5", espi_checkpoint_open(&c, path));
}

Test(checkpoint, full_disk_leaves_the_old_one) {
    char path[256];
    demo_folder(path, "full.h5");
    write_values(path, 1, 1000, ESP_OK);
    struct rlimit limit, old;
    getrlimit(RLIMIT_FSIZE, &old);
    limit = old;
    limit.rlim_cur = 20000;
    signal(SIGXFSZ, SIG_IGN); /* the write then fails, as on a full disk */
    setrlimit(RLIMIT_FSIZE, &limit);
    write_values(path, 2, 100000, ESP_ERR_IO);
    setrlimit(RLIMIT_FSIZE, &old);
    cr_assert_eq(read_first(path, 1000), 1);
    remove(path);
}

Test(checkpoint, killed_while_writing_leaves_a_whole_one) {
    enum { N = 200000 };
    char path[256];
    demo_folder(path, "killed.h5");
    write_values(path, 0, N, ESP_OK);
    for (int round = 0; round < 12; round++) {
        const pid_t child = fork();
        if (child == 0) {
            double *x = malloc(N * sizeof *x);
            for (double value = 1;; value++) {
                for (int64_t i = 0; i < N; i++) x[i] = value;
                const espi_saved_array arrays[] = {{"a/values", ESP_F64, N, x}};
                if (espi_checkpoint_write(path, arrays, 1, NULL) != ESP_OK) _exit(1);
            }
        }
        nanosleep(&(struct timespec){.tv_nsec = 7000000L + 4300000L * round}, NULL);
        cr_assert_eq(kill(child, SIGKILL), 0);
        int how;
        waitpid(child, &how, 0);
        cr_assert(WIFSIGNALED(how), "the writer ended by itself");
        cr_assert(read_first(path, N) >= 0);
    }
    remove(path);
}

/* What a failed resume leaves: the model as it was. */
Test(checkpoint, damaged_resume_changes_nothing) {
    char out[256], path[512], *bytes;
    size_t n;
    demo_folder(out, "resume");
    esp_trainer_config c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .out_dir = out, .steps = 1);
    demo d = demo_trainer(&c);
    OK(esp_trainer_step(d.trainer, NULL));
    demo_free(&d);
    snprintf(path, sizeof path, "%s/checkpoint.h5", out);
    OK(espi_file_read_all(&bytes, &n, path, (size_t)1 << 24));
    bytes[n / 2] ^= 1;
    OK(espi_file_write_atomic(path, bytes, n));
    free(bytes);
    d = demo_model(0, false);
    demo same = demo_model(0, false);
    c.resume_dir = out;
    c.steps = 2;
    FAILS(ESP_ERR_FORMAT, "checksum", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    cr_assert_null(d.trainer);
    cr_assert_eq(memcmp(d.model->adapter.p, same.model->adapter.p, d.model->adapter.bytes), 0);
    demo_free(&d);
    demo_free(&same);
    demo_remove(out);
}
