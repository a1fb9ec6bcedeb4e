/* A TCP proxy that makes a server far away: every byte arrives DELAY_US later, as many on the way as there are.
 *
 * In C and one thread, because the benchmarks that need it count microseconds: the test bed's proxy takes more
 * CPU time for a megabyte than the client. Prints its port; for each line on stdin it prints how many bytes went to
 * the client; ends with stdin.
 *
 * usage: far PORT DELAY_US
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 8 << 20, PIECES = 4096, PIPES = 256 };

/* One direction of one connection: a ring of bytes, and of pieces with the time when each is due. */
struct pipe {
    int from, to, to_client, eof, dead;
    char *bytes;
    size_t put, got;
    struct { size_t bytes; uint64_t due; } piece[PIECES];
    unsigned first, next;
};

static struct pipe *pipes[PIPES];
static int used;
static uint64_t delay_ns, to_client_bytes;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void take(int listener, int port) {
    int one = 1, client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (client < 0 || connect(server, (void *)&at, sizeof at) || used + 2 > PIPES) {
        close(client);
        close(server);
        return;
    }
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    for (int way = 0; way < 2; way++) {
        struct pipe *p = pipes[used++] = calloc(1, sizeof *p);
        p->bytes = malloc(ROOM);
        p->from = way ? server : client;
        p->to = way ? client : server;
        p->to_client = way;
    }
}

static int full(struct pipe *p) { return p->put - p->got == ROOM || p->next - p->first == PIECES; }

static void receive(struct pipe *p) {
    size_t at = p->put % ROOM, most = ROOM - (p->put - p->got);
    if (most > ROOM - at) most = ROOM - at;
    ssize_t n = recv(p->from, p->bytes + at, most, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) { p->eof = 1; return; }
    p->put += n;
    p->piece[p->next % PIECES].bytes = n;
    p->piece[p->next++ % PIECES].due = now() + delay_ns;
}

static void deliver(struct pipe *p) {
    while (p->first != p->next && p->piece[p->first % PIECES].due <= now()) {
        size_t at = p->got % ROOM, most = p->piece[p->first % PIECES].bytes;
        ssize_t n = send(p->to, p->bytes + at, most, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n < 0) { p->dead = 1; return; }
        p->got += n;
        if (p->to_client) to_client_bytes += n;
        if ((p->piece[p->first % PIECES].bytes -= n) == 0) p->first++;
    }
    if (p->eof && p->first == p->next) {
        shutdown(p->to, SHUT_WR);
        p->dead = 1;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: far PORT DELAY_US\n"); return 2; }
    delay_ns = strtoull(argv[2], NULL, 10) * 1000;
    prctl(PR_SET_TIMERSLACK, 1);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 64)) { perror("far"); return 1; }
    getsockname(listener, (void *)&at, &length);
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    for (;;) {
        struct pollfd fds[2 + 2 * PIPES] = {{0, POLLIN, 0}, {listener, POLLIN, 0}};
        uint64_t before = now(), wake = before + 1000000000;
        for (int i = 0; i < used; i++) {
            struct pipe *p = pipes[i];
            int due = p->first != p->next && p->piece[p->first % PIECES].due <= before;
            fds[2 + 2 * i] = (struct pollfd){p->dead || p->eof || full(p) ? -1 : p->from, POLLIN, 0};
            fds[3 + 2 * i] = (struct pollfd){!p->dead && due ? p->to : -1, POLLOUT, 0};
            if (p->first != p->next && !due && p->piece[p->first % PIECES].due < wake)
                wake = p->piece[p->first % PIECES].due;
        }
        struct timespec left = {(wake - before) / 1000000000, (wake - before) % 1000000000};
        ppoll(fds, 2 + 2 * used, &left, NULL);
        if (fds[0].revents) {
            char line[64];
            if (read(0, line, sizeof line) <= 0) return 0;
            printf("%llu\n", (unsigned long long)to_client_bytes);
            fflush(stdout);
        }
        if (fds[1].revents) take(listener, atoi(argv[1]));
        for (int i = 0; i < used; i++) {
            if (fds[2 + 2 * i].revents && fds[2 + 2 * i].fd >= 0) receive(pipes[i]);
            if (!pipes[i]->dead) deliver(pipes[i]);
        }
    }
}
