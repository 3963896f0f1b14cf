/* The file door: whole old files or whole new ones, whatever happens in between. */
#include "core/status.h"
#include "scratch.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

static void expect_text(const char *path, const char *expected) {
    char *text;
    size_t bytes;
    OK(espi_file_read_all(&text, &bytes, path, 1 << 20));
    cr_expect_eq(bytes, strlen(expected));
    cr_expect_str_eq(text, expected);
    free(text);
}

Test(file, replaces_and_reads_back) {
    char dir[ESPI_PATH_MAX], deep[ESPI_PATH_MAX], path[ESPI_PATH_MAX], other[ESPI_PATH_MAX], *text;
    scratch_make(dir);
    OK(espi_path_join(deep, dir, "a/b//c/"));
    OK(espi_dir_make(deep));
    OK(espi_dir_make(deep));
    cr_expect(espi_dir_exists(deep));
    cr_expect_not(espi_file_exists(deep));
    OK(espi_path_join(path, deep, "f"));
    cr_expect_not_null(strstr(path, "/c/f"), "%s", path);
    cr_expect_eq(espi_file_read_all(&text, NULL, path, 10), ESP_ERR_IO);
    cr_expect_not_null(strstr(esp_last_error(), path), "%s", esp_last_error());
    OK(espi_file_write_atomic(path, "one", 3));
    OK(espi_file_write_atomic(path, "two!", 4));
    expect_text(path, "two!");
    cr_expect_eq(espi_file_read_all(&text, NULL, path, 3), ESP_ERR_FORMAT, "larger than the caller allows");
    cr_expect_eq(espi_file_read_all(&text, NULL, deep, 10), ESP_ERR_IO, "a folder");
    OK(espi_path_join(other, dir, "copy"));
    OK(espi_file_copy(other, path));
    expect_text(other, "two!");
    cr_expect_eq(espi_file_copy(other, dir), ESP_ERR_IO, "a folder is no file");
    expect_text(other, "two!");
    char under[ESPI_PATH_MAX];
    OK(espi_path_join(under, other, "x"));
    cr_expect_eq(espi_dir_make(under), ESP_ERR_IO, "a folder under a file");
    cr_expect_eq(espi_file_write_atomic(under, "x", 1), ESP_ERR_IO, "a file under a file");
    cr_expect_eq(espi_dir_make(""), ESP_ERR_ARG);
    memset(under, 'x', sizeof under - 1);
    under[sizeof under - 1] = 0;
    cr_expect_eq(espi_path_join(path, under, "y"), ESP_ERR_ARG, "a path that does not fit");
    scratch_remove(dir);
}

static esp_status fill_large(void *user, espi_out *out) {
    static const char chunk[4096];
    for (int i = 0; i < 64; i++) ESPI_TRY(espi_out_write(out, chunk, sizeof chunk));
    *(bool *)user = true;
    return ESP_OK;
}

/* A file size limit gives the same failing write as a full disk, without filling one. */
/* Why a folder cannot be made is the answer of making it, not of looking for it afterwards.  A kernel file system refuses even root. */
Test(file, a_folder_that_cannot_be_made_says_why) {
    if (!espi_dir_exists("/sys/kernel")) cr_skip("no /sys here");
    cr_expect_eq(espi_dir_make("/sys/espalier"), ESP_ERR_IO);
    cr_expect_not_null(strstr(esp_last_error(), "/sys/espalier: cannot make the folder"), "%s", esp_last_error());
    cr_expect_null(strstr(esp_last_error(), "No such file"), "%s", esp_last_error());
}

Test(file, a_full_disk_leaves_the_old_file) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    scratch_write(path, dir, "f", "old", 3);
    signal(SIGXFSZ, SIG_IGN);
    const struct rlimit before = {.rlim_cur = 65536, .rlim_max = RLIM_INFINITY};
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &before), 0);
    bool finished = false;
    const esp_status status = espi_file_fill_atomic(path, fill_large, &finished);
    const struct rlimit after = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
    setrlimit(RLIMIT_FSIZE, &after);
    cr_expect_eq(status, ESP_ERR_IO);
    cr_expect_not(finished);
    cr_expect_not_null(strstr(esp_last_error(), path), "%s", esp_last_error());
    cr_expect_not_null(strstr(esp_last_error(), "File too large"), "%s", esp_last_error());
    expect_text(path, "old");
    cr_expect_eq(scratch_count(dir), 1, "the temporary file is left");
    scratch_remove(dir);
}

static esp_status fill_and_die(void *user, espi_out *out) {
    (void)user;
    ESPI_TRY(espi_out_write(out, "half of the n", 13));
    kill(getpid(), SIGKILL);
    return ESP_OK;
}

Test(file, a_killed_writer_leaves_the_old_file) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    scratch_write(path, dir, "f", "old", 3);
    const pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        espi_file_fill_atomic(path, fill_and_die, NULL);
        _exit(0);
    }
    int how;
    cr_assert_eq(waitpid(child, &how, 0), child);
    cr_expect(WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL);
    expect_text(path, "old");
    scratch_remove(dir);
}

Test(file, a_file_that_a_library_wrote_is_committed) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], temp[ESPI_PATH_MAX];
    scratch_make(dir);
    scratch_write(path, dir, "f", "old", 3);
    OK(espi_file_temp_name(temp, path));
    cr_expect_eq(espi_file_commit(path, temp), ESP_ERR_IO, "nothing was written");
    expect_text(path, "old");
    FILE *f = fopen(temp, "w");
    cr_assert_not_null(f);
    fputs("new", f);
    fclose(f);
    OK(espi_file_commit(path, temp));
    expect_text(path, "new");
    cr_expect_eq(scratch_count(dir), 1);
    espi_file_remove(path);
    espi_file_remove(path);
    cr_expect_eq(scratch_count(dir), 0);
    scratch_remove(dir);
}

Test(file, logs_grow_by_lines_and_forget_what_a_resume_forgets) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    OK(espi_path_join(path, dir, "log.jsonl"));
    espi_log_file *log = NULL;
    OK(espi_log_file_open(&log, path, 0));
    OK(espi_log_file_line(log, "{\"step\":1}"));
    const int64_t mark = espi_log_file_bytes(log);
    OK(espi_log_file_line(log, "{\"step\":2}"));
    OK(espi_log_file_close(log));
    expect_text(path, "{\"step\":1}\n{\"step\":2}\n");
    OK(espi_log_file_open(&log, path, mark));
    OK(espi_log_file_line(log, "{\"step\":3}"));
    OK(espi_log_file_close(log));
    expect_text(path, "{\"step\":1}\n{\"step\":3}\n");
    OK(espi_log_file_open(&log, path, -1));
    cr_expect_eq(espi_log_file_bytes(log), 22);
    OK(espi_log_file_close(log));
    cr_expect_eq(espi_log_file_open(&log, path, 23), ESP_ERR_MISMATCH);
    cr_expect_not_null(strstr(esp_last_error(), path), "%s", esp_last_error());
    OK(espi_log_file_open(&log, path, 0));
    OK(espi_log_file_close(log));
    expect_text(path, "");
    OK(espi_log_file_close(NULL));
    cr_expect_eq(espi_log_file_open(&log, dir, -1), ESP_ERR_IO, "a folder");
    scratch_remove(dir);
}
