/* Ranks that find each other without a launcher, by a file or an address, and talk over TCP: one connection for every pair. */
#define _GNU_SOURCE /* POLLRDHUP */

#include "dist/comm.h"

#include "core/clock.h"
#include "core/status.h"
#include "io/file.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define ADDRESS 256
#define GREETING UINT64_C(0x657370616c696572) /* "espalier" */

/* A process, as those of the same machine know it. */
typedef struct process {
    uint64_t processes; /* which set of process numbers: containers have their own */
    int64_t number;
} process;

typedef struct mesh {
    int rank, size, listener;
    int *peer;            /* [size] connections; -1: none, or oneself */
    process *process;     /* [size] behind them, and this one */
    struct pollfd *polls; /* [size] */
    size_t *sent, *taken; /* [size] bytes of the message under way */
} mesh;

static double left(double deadline) {
    return deadline - espi_seconds();
}

static int milliseconds(double deadline) {
    const double seconds = left(deadline);
    return seconds <= 0 ? 0 : seconds > 1 ? 1000 : (int)(seconds * 1000) + 1;
}

static void close_mesh(void *self, bool broken) {
    (void)broken;
    mesh *m = self;
    for (int r = 0; m->peer && r < m->size; r++)
        if (m->peer[r] >= 0) close(m->peer[r]);
    if (m->listener >= 0) close(m->listener);
    free(m->peer);
    free(m->process);
    free(m->polls);
    free(m->sent);
    free(m->taken);
    free(m);
}

static mesh *make_mesh(int rank, int size) {
    mesh *m = calloc(1, sizeof *m);
    if (m == NULL) return NULL;
    *m = (mesh){.rank = rank, .size = size, .listener = -1};
    m->process = calloc((size_t)size, sizeof *m->process);
    m->peer = malloc((size_t)size * sizeof *m->peer);
    m->polls = calloc((size_t)size, sizeof *m->polls);
    m->sent = calloc((size_t)size, sizeof *m->sent);
    m->taken = calloc((size_t)size, sizeof *m->taken);
    for (int r = 0; m->peer && r < size; r++) m->peer[r] = -1;
    if (m->peer && m->process && m->polls && m->sent && m->taken) return m;
    close_mesh(m, true);
    return NULL;
}

/* ---- moving bytes ---- */

/* "1, 3": the ranks with something still on its way. */
static void awaited(char text[128], const mesh *m, const espi_message *out, const espi_message *in) {
    size_t n = 0;
    text[0] = '\0';
    for (int r = 0; r < m->size && n < 100; r++) {
        if (r == m->rank || (m->sent[r] == out[r].bytes && m->taken[r] == in[r].bytes)) continue;
        n += (size_t)snprintf(text + n, 128 - n, "%s%d", n ? ", " : "", r);
    }
}

static esp_status lost(int r, const char *why) {
    return ESPI_FAIL(ESP_ERR_COMM, "the connection to rank %d is gone (%s): that rank has ended", r, why);
}

/* What can be moved now between this rank and r. */
static esp_status move(mesh *m, int r, short ready, const espi_message *out, const espi_message *in) {
    if (ready & POLLOUT && m->sent[r] < out[r].bytes) {
        const ssize_t n = send(m->peer[r], (const char *)out[r].data + m->sent[r], out[r].bytes - m->sent[r], MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != EINTR) return lost(r, strerror(errno));
        if (n > 0) m->sent[r] += (size_t)n;
    }
    if (ready & (POLLIN | POLLHUP | POLLERR) && m->taken[r] < in[r].bytes) {
        const ssize_t n = recv(m->peer[r], (char *)in[r].data + m->taken[r], in[r].bytes - m->taken[r], 0);
        if (n == 0) return lost(r, "closed by the other side");
        if (n < 0 && errno != EAGAIN && errno != EINTR) return lost(r, strerror(errno));
        if (n > 0) m->taken[r] += (size_t)n;
    }
    return ESP_OK;
}

static esp_status transfer(void *self, const espi_message *out, const espi_message *in, double deadline) {
    mesh *m = self;
    if (in[m->rank].data != NULL && out[m->rank].data != NULL) memcpy(in[m->rank].data, out[m->rank].data, in[m->rank].bytes);
    memset(m->sent, 0, (size_t)m->size * sizeof *m->sent);
    memset(m->taken, 0, (size_t)m->size * sizeof *m->taken);
    for (;;) {
        bool waiting = false;
        for (int r = 0; r < m->size; r++) {
            short events = 0;
            if (r != m->rank && m->sent[r] < out[r].bytes) events |= POLLOUT;
            if (r != m->rank && m->taken[r] < in[r].bytes) events |= POLLIN;
            m->polls[r] = (struct pollfd){.fd = events ? m->peer[r] : -1, .events = events};
            waiting = waiting || events;
        }
        if (!waiting) return ESP_OK;
        if (left(deadline) <= 0) {
            char who[128];
            awaited(who, m, out, in);
            return ESPI_FAIL(ESP_ERR_COMM, "the deadline passed while waiting for rank %s", who);
        }
        if (poll(m->polls, (nfds_t)m->size, milliseconds(deadline)) <= 0) continue; /* a signal, or nothing yet */
        for (int r = 0; r < m->size; r++)
            if (m->polls[r].revents) ESPI_TRY(move(m, r, m->polls[r].revents, out, in));
    }
}

/* ---- the end of a job ---- */

/* Whether a peer has closed its side, or does so until the deadline; what it still sends is dropped. */
static bool closed_by(int fd, double deadline) {
    char dropped[4096];
    for (;;) {
        const ssize_t n = recv(fd, dropped, sizeof dropped, 0);
        if (n > 0 || (n < 0 && errno == EINTR)) continue;
        if (n == 0 || errno != EAGAIN) return true;
        if (left(deadline) <= 0) return false;
        (void)poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, milliseconds(deadline));
    }
}

/* Both ends of the connection are at one address. */
static bool on_this_machine(int fd) {
    struct sockaddr_in here = {0}, there = {0};
    socklen_t bytes = sizeof here, their_bytes = sizeof there;
    return getsockname(fd, (struct sockaddr *)&here, &bytes) == 0 && getpeername(fd, (struct sockaddr *)&there, &their_bytes) == 0 &&
           here.sin_addr.s_addr == there.sin_addr.s_addr;
}

/* The others find the connections closed.  Who does not is stopped or busy, and nobody else is there to end it. */
static void give_up(void *self, int code) {
    (void)code;
    mesh *m = self;
    const process *mine = &m->process[m->rank];
    const double deadline = espi_seconds() + 3;
    for (int r = 0; r < m->size; r++)
        if (m->peer[r] >= 0) shutdown(m->peer[r], SHUT_WR);
    for (int r = 0; r < m->size; r++) {
        if (m->peer[r] < 0 || closed_by(m->peer[r], deadline)) continue;
        const process *p = &m->process[r];
        if (p->processes == mine->processes && p->processes != 0 && on_this_machine(m->peer[r])) kill((pid_t)p->number, SIGKILL);
    }
}

static bool somebody_left(void *self) {
    const mesh *m = self;
    for (int r = 0; r < m->size; r++) {
        struct pollfd p = {.fd = m->peer[r], .events = POLLRDHUP};
        if (m->peer[r] >= 0 && poll(&p, 1, 0) > 0) return true;
    }
    return false;
}

static const espi_transport tcp = {
    .name = "tcp", .transfer = transfer, .end_job = give_up, .close = close_mesh, .lost = somebody_left, .leave_together = true};

/* ---- finding each other ---- */

/* Waits until the socket can be read or written. */
static bool ready_by(int fd, short events, double deadline) {
    struct pollfd p = {.fd = fd, .events = events};
    while (left(deadline) > 0)
        if (poll(&p, 1, milliseconds(deadline)) > 0) return true;
    return false;
}

/* All of `bytes`, in or out, over a connection that does not block. */
static esp_status whole(int fd, void *data, size_t bytes, bool out, double deadline, const char *who) {
    for (size_t done = 0; done < bytes;) {
        if (!ready_by(fd, out ? POLLOUT : POLLIN, deadline))
            return ESPI_FAIL(ESP_ERR_COMM, "the deadline passed while waiting for %s", who);
        const ssize_t n = out ? send(fd, (char *)data + done, bytes - done, MSG_NOSIGNAL) : recv(fd, (char *)data + done, bytes - done, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return ESPI_FAIL(ESP_ERR_COMM, "the connection to %s is gone (%s)", who, n ? strerror(errno) : "closed by the other side");
        if (n > 0) done += (size_t)n;
    }
    return ESP_OK;
}

static void prepare(int fd) {
    const int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* refused: slower, not wrong */
    (void)fcntl(fd, F_SETFL, O_NONBLOCK);
    (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* wanted 0: any port. */
static esp_status listen_at(int *listener, int *port, int wanted) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)wanted), .sin_addr.s_addr = htonl(INADDR_ANY)};
    const int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    socklen_t length = sizeof at;
    *listener = fd;
    if (fd >= 0) (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) != 0 || listen(fd, 128) != 0 ||
        getsockname(fd, (struct sockaddr *)&at, &length) != 0)
        return ESPI_FAIL(ESP_ERR_COMM, "cannot listen at port %d: %s", wanted, strerror(errno));
    prepare(fd);
    *port = ntohs(at.sin_port);
    return ESP_OK;
}

/* "host:port" apart.  ESP_ERR_ARG. */
static esp_status split(char host[ADDRESS], int *port, const char *address) {
    const char *colon = strrchr(address, ':');
    char *end = NULL;
    const long value = colon ? strtol(colon + 1, &end, 10) : 0;
    if (!colon || colon == address || colon - address >= ADDRESS || *end != '\0' || value < 1 || value > 65535)
        return ESPI_FAIL(ESP_ERR_ARG, "got the address %s, expected host:port", address);
    snprintf(host, ADDRESS, "%.*s", (int)(colon - address), address);
    *port = (int)value;
    return ESP_OK;
}

/* Tries until the other side listens. */
static esp_status connect_to(int *connection, const char *address, double deadline) {
    char host[ADDRESS], service[16];
    int port, error = 0;
    ESPI_TRY(split(host, &port, address));
    snprintf(service, sizeof service, "%d", port);
    do {
        struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
        const int refused = getaddrinfo(host, service, &hints, &found);
        if (refused) return ESPI_FAIL(ESP_ERR_COMM, "cannot find %s: %s", address, gai_strerror(refused));
        const int fd = socket(AF_INET, SOCK_STREAM, 0);
        const bool connected = fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) == 0;
        error = errno;
        freeaddrinfo(found);
        if (connected) {
            prepare(fd);
            *connection = fd;
            return ESP_OK;
        }
        if (fd >= 0) close(fd);
        (void)poll(NULL, 0, 20);
    } while (left(deadline) > 0);
    return ESPI_FAIL(ESP_ERR_COMM, "nobody answers at %s: %s", address, strerror(error));
}

/* What the two sides of a new connection tell each other. */
typedef struct hello {
    uint64_t greeting;
    int32_t rank, size;
    char address[ADDRESS]; /* where that rank listens */
} hello;

static esp_status check_hello(const mesh *m, const hello *h) {
    if (h->greeting != GREETING || h->size != m->size || h->rank < 0 || h->rank >= m->size || h->rank == m->rank)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "somebody who is not of this job called: rank %d of %d, expected another rank of %d", h->rank,
                         h->size, m->size);
    if (m->peer[h->rank] >= 0) return ESPI_FAIL(ESP_ERR_MISMATCH, "two processes say that they are rank %d", h->rank);
    return ESP_OK;
}

static esp_status accept_one(mesh *m, hello *theirs, double deadline) {
    if (!ready_by(m->listener, POLLIN, deadline)) {
        char missing[128];
        size_t n = 0;
        for (int r = 0; r < m->size && n < 100; r++)
            if (r != m->rank && m->peer[r] < 0) n += (size_t)snprintf(missing + n, sizeof missing - n, "%s%d", n ? ", " : "", r);
        return ESPI_FAIL(ESP_ERR_COMM, "the deadline passed before all ranks came: missing rank %s", missing);
    }
    const int fd = accept(m->listener, NULL, NULL);
    if (fd < 0) return ESPI_FAIL(ESP_ERR_COMM, "cannot take a connection: %s", strerror(errno));
    prepare(fd);
    esp_status status = whole(fd, theirs, sizeof *theirs, false, deadline, "a rank that connected");
    if (status == ESP_OK) status = check_hello(m, theirs);
    if (status == ESP_OK)
        m->peer[theirs->rank] = fd;
    else
        close(fd);
    return status;
}

static esp_status call_rank(mesh *m, int r, const char *address, const hello *mine, double deadline) {
    char who[ADDRESS + 32];
    snprintf(who, sizeof who, "rank %d at %s", r, address);
    hello copy = *mine;
    ESPI_TRY(connect_to(&m->peer[r], address, deadline));
    return whole(m->peer[r], &copy, sizeof copy, true, deadline, who);
}

/* The name under which others reach this machine: ESP_HOST; unset, all ranks are on one machine. */
static void own_address(char out[ADDRESS], int port) {
    char host[ADDRESS - 8] = "127.0.0.1";
    const char *stated = getenv("ESP_HOST");
    if (stated != NULL && stated[0] != '\0') snprintf(host, sizeof host, "%s", stated);
    snprintf(out, ADDRESS, "%s:%d", host, port);
}

/* Rank 0 listens at the address; the others call it, learn who listens where, and call those below them. */
static esp_status by_address(mesh *m, const char *rendezvous, double deadline) {
    char host[ADDRESS], (*table)[ADDRESS] = NULL;
    hello mine = {.greeting = GREETING, .rank = m->rank, .size = m->size};
    int port, wanted;
    ESPI_TRY(split(host, &wanted, rendezvous));
    ESPI_TRY(listen_at(&m->listener, &port, m->rank == 0 ? wanted : 0));
    own_address(mine.address, port);
    table = calloc((size_t)m->size, sizeof *table);
    if (table == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the addresses of %d ranks", m->size);
    const size_t bytes = (size_t)m->size * sizeof *table;
    esp_status status = ESP_OK;
    if (m->rank == 0) {
        for (int i = 1; i < m->size && status == ESP_OK; i++) {
            hello theirs;
            status = accept_one(m, &theirs, deadline);
            if (status == ESP_OK) memcpy(table[theirs.rank], theirs.address, ADDRESS);
        }
        for (int r = 1; r < m->size && status == ESP_OK; r++) status = whole(m->peer[r], table, bytes, true, deadline, "a rank");
    } else {
        status = call_rank(m, 0, rendezvous, &mine, deadline);
        if (status == ESP_OK) status = whole(m->peer[0], table, bytes, false, deadline, "rank 0");
        for (int r = 1; r < m->rank && status == ESP_OK; r++) status = call_rank(m, r, table[r], &mine, deadline);
        for (int r = m->rank + 1; r < m->size && status == ESP_OK; r++) {
            hello theirs;
            status = accept_one(m, &theirs, deadline);
        }
    }
    free(table);
    return status;
}

/* What the folder says of a rank may be left from an earlier job: it is read again until somebody answers there. */
static esp_status call_from_folder(mesh *m, int r, const char *folder, const hello *mine, double deadline) {
    char name[32], path[ESPI_PATH_MAX];
    snprintf(name, sizeof name, "rank-%d", r);
    ESPI_TRY(espi_path_join(path, folder, name));
    esp_status status;
    do {
        char *address = NULL;
        const double soon = espi_seconds() + 0.2;
        status = espi_file_exists(path) ? espi_file_read_all(&address, NULL, path, ADDRESS - 1)
                                        : ESPI_FAIL(ESP_ERR_COMM, "rank %d did not come: there is no %s", r, path);
        if (status == ESP_OK) status = call_rank(m, r, address, mine, soon < deadline ? soon : deadline);
        free(address);
        if (status != ESP_OK) (void)poll(NULL, 0, 20);
    } while (status == ESP_ERR_COMM && left(deadline) > 0);
    return status;
}

/* Every rank writes where it listens into the folder; each calls those below it. */
static esp_status by_folder(mesh *m, const char *folder, double deadline) {
    char path[ESPI_PATH_MAX], name[32];
    hello mine = {.greeting = GREETING, .rank = m->rank, .size = m->size};
    int port;
    ESPI_TRY(listen_at(&m->listener, &port, 0));
    own_address(mine.address, port);
    ESPI_TRY(espi_dir_make(folder));
    snprintf(name, sizeof name, "rank-%d", m->rank);
    ESPI_TRY(espi_path_join(path, folder, name));
    ESPI_TRY(espi_file_write_atomic(path, mine.address, strlen(mine.address)));
    esp_status status = ESP_OK;
    for (int r = 0; r < m->rank && status == ESP_OK; r++) status = call_from_folder(m, r, folder, &mine, deadline);
    for (int r = m->rank + 1; r < m->size && status == ESP_OK; r++) {
        hello theirs;
        status = accept_one(m, &theirs, deadline);
    }
    espi_file_remove(path);
    return status;
}

/* Every rank learns which processes the others are. */
static esp_status introduce(mesh *m, double deadline) {
    struct stat at;
    espi_message *send = calloc(2 * (size_t)m->size, sizeof *send), *recv = send + m->size;
    if (send == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the messages of %d ranks", m->size);
    process mine = {.processes = stat("/proc/self/ns/pid", &at) == 0 ? (uint64_t)at.st_ino : 0, .number = getpid()};
    for (int r = 0; r < m->size; r++) {
        send[r] = (espi_message){&mine, sizeof mine};
        recv[r] = (espi_message){&m->process[r], sizeof mine};
    }
    const esp_status status = transfer(m, send, recv, deadline);
    free(send);
    return status;
}

esp_status espi_comm_tcp(esp_comm **comm, int rank, int size, const char *rendezvous, double patience) {
    static const char folder[] = "file:";
    mesh *m = make_mesh(rank, size);
    if (m == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the connections to %d ranks", size);
    const double deadline = espi_seconds() + patience;
    esp_status status = strncmp(rendezvous, folder, sizeof folder - 1) == 0 ? by_folder(m, rendezvous + sizeof folder - 1, deadline)
                                                                            : by_address(m, rendezvous, deadline);
    if (status == ESP_OK) status = introduce(m, deadline);
    if (status != ESP_OK) {
        close_mesh(m, true);
        return status;
    }
    return espi_comm_make(comm, &tcp, m, rank, size);
}
