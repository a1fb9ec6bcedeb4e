/* The floor: a FUSE file system that answers everything at once from memory.
 *
 * What it costs to ask this one is what FUSE costs on this machine; a client can only come near it.
 * One directory with N files f0… of zeros, a file "big" with the bytes of BIG (a file, best in memory), and room for
 * files that are created. One thread, as efcfs has one event loop.
 *
 * usage: floor MOUNTPOINT FILES FILE_BYTES BIG TIMEOUT_S
 */
#define FUSE_USE_VERSION 314
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { BIG = 2, FIRST = 3 };

struct file { char name[64]; char *data; size_t size, room; int next; };

static struct file *files;      /* inode number - FIRST */
static int used, room, buckets[1 << 18];
static size_t big_bytes;
static double timeout_s;
static char *big;

static unsigned hash(const char *s) {
    unsigned h = 5381;
    while (*s) h = h * 33 + (unsigned char)*s++;
    return h & ((1 << 18) - 1);
}

static int find(const char *name) {
    for (int i = buckets[hash(name)]; i; i = files[i - 1].next)
        if (!strcmp(files[i - 1].name, name)) return i - 1;
    return -1;
}

static int make(const char *name) {
    if (used == room) files = realloc(files, (room = room ? room * 2 : 1024) * sizeof *files);
    unsigned h = hash(name);
    memset(&files[used], 0, sizeof *files);
    strncpy(files[used].name, name, sizeof files->name - 1);
    files[used].next = buckets[h];
    buckets[h] = ++used;
    return used - 1;
}

static void fill(fuse_ino_t ino, struct stat *st) {
    memset(st, 0, sizeof *st);
    st->st_ino = ino;
    st->st_mode = ino == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0644;
    st->st_nlink = ino == FUSE_ROOT_ID ? 2 : 1;
    st->st_size = ino == FUSE_ROOT_ID ? 4096 : ino == BIG ? big_bytes : files[ino - FIRST].size;
    st->st_blksize = 131072;
}

static void entry(fuse_ino_t ino, struct fuse_entry_param *e) {
    memset(e, 0, sizeof *e);
    e->ino = ino;
    e->attr_timeout = e->entry_timeout = timeout_s;
    fill(ino, &e->attr);
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name) {
    struct fuse_entry_param e;
    int i = find(name);
    if (!strcmp(name, "big")) entry(BIG, &e);
    else if (i >= 0) entry(FIRST + i, &e);
    else { fuse_reply_err(req, ENOENT); return; }
    fuse_reply_entry(req, &e);
}

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    struct stat st;
    fill(ino, &st);
    fuse_reply_attr(req, &st, timeout_s);
}

static void do_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) { fuse_reply_open(req, fi); }

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi) {
    size_t end = ino == BIG ? big_bytes : files[ino - FIRST].size;
    if ((size_t)off >= end) { fuse_reply_buf(req, NULL, 0); return; }
    if (size > end - off) size = end - off;
    fuse_reply_buf(req, ino == BIG ? big + off : files[ino - FIRST].data + off, size);
}

static void do_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi) {
    struct file *f = &files[ino - FIRST];
    if (ino != BIG && f->room < off + size) f->data = realloc(f->data, f->room = 2 * (off + size));
    if (ino != BIG && f->size < off + size) f->size = off + size;
    if (ino != BIG) memcpy(f->data + off, buf, size);
    fuse_reply_write(req, size);
}

static void do_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi) {
    struct fuse_entry_param e;
    int i = find(name);
    entry(FIRST + (i >= 0 ? i : make(name)), &e);
    fuse_reply_create(req, &e, fi);
}

static void do_unlink(fuse_req_t req, fuse_ino_t parent, const char *name) {
    int i = find(name);
    if (i < 0) { fuse_reply_err(req, ENOENT); return; }
    files[i].name[0] = 0; /* found no more; its memory stays, as an open file's must */
    fuse_reply_err(req, 0);
}

static void do_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi) {
    char *buf = malloc(size);
    size_t at = 0;
    for (int i = off; i < used; i++) {
        struct fuse_entry_param e;
        if (!files[i].name[0]) continue;
        entry(FIRST + i, &e);
        size_t n = fuse_add_direntry_plus(req, buf + at, size - at, files[i].name, &e, i + 1);
        if (n > size - at) break;
        at += n;
    }
    fuse_reply_buf(req, buf, at);
    free(buf);
}

static void ok(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) { fuse_reply_err(req, 0); }
static void do_fsync(fuse_req_t req, fuse_ino_t ino, int d, struct fuse_file_info *fi) { fuse_reply_err(req, 0); }

static const struct fuse_lowlevel_ops ops = {
    .lookup = do_lookup, .getattr = do_getattr, .open = do_open, .read = do_read, .write = do_write,
    .create = do_create, .unlink = do_unlink, .readdirplus = do_readdirplus, .opendir = do_open,
    .flush = ok, .release = ok, .releasedir = ok, .fsync = do_fsync,
};

int main(int argc, char **argv) {
    if (argc != 6) { fprintf(stderr, "usage: floor MOUNTPOINT FILES FILE_BYTES BIG TIMEOUT_S\n"); return 1; }
    char *fuse_argv[] = { argv[0], "-o", "default_permissions", NULL };
    struct fuse_args args = FUSE_ARGS_INIT(3, fuse_argv);
    int n = atoi(argv[2]);
    size_t file_bytes = strtoull(argv[3], NULL, 10);
    int fd = open(argv[4], O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) { perror(argv[4]); return 1; }
    big_bytes = st.st_size;
    if (big_bytes) big = mmap(NULL, big_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    timeout_s = atof(argv[5]);
    for (int i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "f%d", i);
        int made = make(name);
        files[made].data = calloc(1, files[made].size = files[made].room = file_bytes);
    }
    struct fuse_session *se = fuse_session_new(&args, &ops, sizeof ops, NULL);
    if (!se || fuse_set_signal_handlers(se) || fuse_session_mount(se, argv[1])) return 2;
    fuse_session_loop(se);
    fuse_session_unmount(se);
    fuse_session_destroy(se);
    return 0;
}
