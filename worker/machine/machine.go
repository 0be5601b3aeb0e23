// Package machine finds out what a machine is: by what it is known, and what it has of
// memory, cores and GPUs. What can't be found out is left out.
package machine

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Facts are what a machine is.
type Facts struct {
	// VRAMMB is the memory of all GPUs, RAMMB the machine's, in MiB; 0: unknown, or none.
	VRAMMB, RAMMB int64
	CPUCores      int
	// GPU is the type of the GPUs, with their number if there are several; empty: unknown,
	// or none.
	GPU string
	// OS is the operating system and the processor's architecture.
	OS string
}

// toolWait bounds how long a tool of a driver may take. One that hangs must not keep a
// worker from starting.
const toolWait = 5 * time.Second

// Look finds out what this machine is.
func Look(ctx context.Context) Facts {
	f := Facts{RAMMB: ram(), CPUCores: runtime.NumCPU(), OS: system() + runtime.GOOS + "/" + runtime.GOARCH}
	gpus := nvidia(ctx)
	if len(gpus) == 0 {
		gpus = others()
	}
	var types []string
	count := make(map[string]int)
	for _, g := range gpus {
		f.VRAMMB += g.vramMB
		if count[g.name]++; count[g.name] == 1 {
			types = append(types, g.name)
		}
	}
	for i, name := range types {
		if n := count[name]; n > 1 {
			types[i] = fmt.Sprintf("%d × %s", n, name)
		}
	}
	f.GPU = clip(strings.Join(types, ", "))
	return f
}

// maxFact bounds a text of the facts, in bytes.
const maxFact = 200

func clip(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxFact)], "")
}

type gpu struct {
	name   string
	vramMB int64
}

// nvidia asks the tool that comes with NVIDIA's driver.
func nvidia(ctx context.Context) []gpu {
	ctx, cancel := context.WithTimeout(ctx, toolWait)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil
	}
	return parseNVIDIA(string(out))
}

// parseNVIDIA reads lines like "NVIDIA GeForce RTX 4090, 24564". A GPU that shares the
// machine's memory has "[N/A]".
func parseNVIDIA(out string) (gpus []gpu) {
	r := csv.NewReader(strings.NewReader(out))
	r.TrimLeadingSpace = true
	r.FieldsPerRecord = -1
	lines, err := r.ReadAll()
	if err != nil {
		return nil
	}
	for _, line := range lines {
		if len(line) != 2 {
			continue
		}
		mb, err := strconv.ParseInt(strings.TrimSpace(line[1]), 10, 64)
		if err != nil || mb < 0 {
			mb = 0
		}
		gpus = append(gpus, gpu{strings.TrimSpace(line[0]), mb})
	}
	return gpus
}

// Hash is the form in which a machine's id leaves the machine.
type Hash [sha256.Size]byte

// hashed hides an id. The id itself is for this machine's own use, and says the same to
// everybody who asks; its hash is OwnLLM's alone.
func hashed(id string) Hash {
	return sha256.Sum256([]byte("the machine id of an OwnLLM agent\x00" + id))
}

// idFile keeps the id of a machine that has none of its own.
const idFile = "machine.id"

// ID returns by what this machine is known: by the given name if there is one, else by the
// id of its operating system. A container has none of its own, and neither has some other
// machine: there it is a random one, which is made once and kept in dir.
func ID(name, dir string) (Hash, error) {
	if name != "" {
		return hashed(name), nil
	}
	if id := own(); id != "" && !contained() {
		return hashed(id), nil
	}
	path := filepath.Join(dir, idFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		b = []byte(rand.Text() + "\n")
		err = os.WriteFile(path, b, 0o600)
	}
	id := strings.TrimSpace(string(b))
	if err == nil && id == "" {
		err = fmt.Errorf("%s is empty: remove it", path)
	}
	if err != nil {
		return Hash{}, fmt.Errorf("machine id: %w", err)
	}
	return hashed(id), nil
}

// firstLine is the first line of the first of the files that can be read and isn't empty.
func firstLine(paths ...string) string {
	for _, path := range paths {
		b, err := os.ReadFile(path)
		line, _, _ := strings.Cut(string(b), "\n")
		if line = strings.TrimSpace(line); err == nil && line != "" {
			return line
		}
	}
	return ""
}

// contained reports whether this is a container, whose image may have brought an id along.
func contained() bool {
	return slices.ContainsFunc([]string{"/.dockerenv", "/run/.containerenv"}, func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	}) || os.Getenv("KUBERNETES_SERVICE_HOST") != ""
}
