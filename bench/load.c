/* A load generator: one operation, over and over, by a number of processes.
 *
 * usage: load OPERATION DIRECTORY FILES CLIENTS SECONDS
 * "make" creates, writes and closes FILES files of 32 KiB, once, in SECONDS at most; "make-apart" does so in a
 * directory for each client, DIRECTORY/0, DIRECTORY/1 …
 * Files are DIRECTORY/f0 … f(FILES-1). Prints "operations seconds p50_us p99_us". In C, so that the figure is
 * the file system's and not the client's.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SAMPLES = 1 << 18 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void check(int failed, const char *what) {
    if (failed) { perror(what); exit(3); }
}

static int compare(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
    if (argc != 6) { fprintf(stderr, "usage: load OPERATION DIRECTORY FILES CLIENTS SECONDS\n"); return 1; }
    const char *op = argv[1], *dir = argv[2];
    int files = atoi(argv[3]), clients = atoi(argv[4]), apart = !strcmp(op, "make-apart");
    int make = apart || !strcmp(op, "make");
    double seconds = atof(argv[5]);
    float *latency = mmap(NULL, sizeof(float) * SAMPLES * clients, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    long *count = mmap(NULL, sizeof(long) * clients, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    double start = now();
    for (int c = 0; c < clients; c++) {
        if (fork()) continue;
        char path[4096], block[32768];
        size_t bytes = make ? sizeof block : 4096;
        memset(block, 'x', sizeof block);
        struct stat st;
        int held = -1;
        if (!strcmp(op, "getattr")) {
            snprintf(path, sizeof path, "%s/f%d", dir, c);
            check((held = open(path, O_RDONLY)) < 0, path);
        }
        long n = 0;
        for (; now() - start < seconds && !(make && n * clients + c >= files); n++) {
            /* Each client has files of its own, one after the other. */
            long i = (n * clients + c) % files;
            double begin = now();
            snprintf(path, sizeof path, "%s/f%ld", dir, i);
            if (!strcmp(op, "getattr")) check(fstat(held, &st), "fstat");
            else if (!strcmp(op, "lookup")) check(stat(path, &st), path);
            else if (!strcmp(op, "read")) {
                int fd = open(path, O_RDONLY);
                check(fd < 0 || read(fd, block, bytes) < 0 || close(fd), path);
            } else if (make || !strcmp(op, "create")) {
                snprintf(path, sizeof path, apart ? "%s/%d/new-%ld" : "%s/new-%d-%ld", dir, c, n);
                int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
                check(fd < 0 || write(fd, block, bytes) != (ssize_t)bytes || close(fd), path);
            } else if (!strcmp(op, "readdir")) {
                DIR *d = opendir(dir);
                check(!d, dir);
                while (readdir(d)) ;
                closedir(d);
            } else return 1;
            if (n < SAMPLES) latency[(long)c * SAMPLES + n] = now() - begin;
        }
        count[c] = n;
        _exit(0);
    }
    int status, failed = 0;
    while (wait(&status) > 0) failed |= status;
    if (failed) return 3;
    double elapsed = now() - start;
    long total = 0, kept = 0;
    for (int c = 0; c < clients; c++) {
        long n = count[c] < SAMPLES ? count[c] : SAMPLES;
        memmove(latency + kept, latency + (long)c * SAMPLES, n * sizeof *latency);
        kept += n;
        total += count[c];
    }
    if (!total) return 3;
    qsort(latency, kept, sizeof *latency, compare);
    printf("%ld %.3f %.1f %.1f\n", total, elapsed, latency[kept / 2] * 1e6, latency[kept * 99 / 100] * 1e6);
    return 0;
}
