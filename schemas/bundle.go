package schemas

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// A bundle is one message with chunk frames of several attempts, from one worker to one owner.
// A worker with many replies under way sends most chunks so, since a message costs the bus as
// much as a token is worth. On the wire each of its frames is one line of JSON, the head of an
// entry, followed by the frame as AppendFrame writes it; the next entry comes right behind.
// A bundle is never a request.
//
// It means what its frames mean one after the other, each on the OutSubject of its nonce.

// BundleHead is the head of an entry of a bundle.
type BundleHead struct {
	// Nonce is that of the attempt that the frame is of.
	Nonce Nonce `json:"nonce"`
	// Size is that of the frame in bytes.
	Size int `json:"size"`
}

const (
	bundleNonce = `{"nonce":"`
	bundleSize  = `","size":`
)

// AppendEntry appends an entry of a bundle. The nonce has to be one that NewNonce may return.
func AppendEntry(dst []byte, n Nonce, frame []byte) []byte {
	dst = append(dst, bundleNonce...)
	dst = append(dst, n...)
	dst = append(dst, bundleSize...)
	dst = strconv.AppendInt(dst, int64(len(frame)), 10)
	dst = append(dst, '}', '\n')
	return append(dst, frame...)
}

// CutEntry cuts the first entry off a bundle. The frame and what is left are parts of b.
func CutEntry(b []byte) (n Nonce, frame, left []byte, err error) {
	line, rest, ok := bytes.Cut(b, []byte{'\n'})
	if !ok {
		return "", nil, nil, errors.New("bundle has an entry without a head")
	}
	head, ok := decodeBundleHead(line)
	if !ok {
		if head, err = unmarshalBundleHead(line); err != nil {
			return "", nil, nil, err
		}
	}
	if head.Size < 0 || head.Size > len(rest) {
		return "", nil, nil, fmt.Errorf("bundle has an entry of %d bytes, and %d are left", head.Size, len(rest))
	}
	return head.Nonce, rest[:head.Size:head.Size], rest[head.Size:], nil
}

// decodeBundleHead reads the head that AppendEntry writes; anything else, however valid, it
// leaves to encoding/json.
func decodeBundleHead(line []byte) (head BundleHead, ok bool) {
	rest, ok := bytes.CutPrefix(line, []byte(bundleNonce))
	if !ok {
		return head, false
	}
	end := bytes.IndexByte(rest, '"')
	if end < 0 || !plainToken(rest[:end]) {
		return head, false
	}
	head.Nonce = Nonce(rest[:end])
	if rest, ok = bytes.CutPrefix(rest[end:], []byte(bundleSize)); !ok {
		return head, false
	}
	size, rest, ok := cutUint(rest)
	head.Size = int(size)
	return head, ok && len(rest) == 1 && rest[0] == '}'
}

func unmarshalBundleHead(line []byte) (head BundleHead, err error) {
	if err := json.Unmarshal(line, &head); err != nil {
		return head, fmt.Errorf("head of an entry of a bundle: %w", err)
	}
	return head, nil
}
