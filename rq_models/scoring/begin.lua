-- Begin a run, or another attempt of one, unless it is active or was begun otherwise.
--
-- KEYS  1 the run, 2 what is done of it, 3 all runs
-- ARGV  1 what is asked for (JSON), 2 the run's id, 3 time now, 4 whether to start over, 5 seconds to keep it
-- Returns {state, attempt, ''} of the run as it is now, or {'conflict', attempt, what was asked for before}.
local call = redis.call
local state, attempt, asked, rows = unpack(call('HMGET', KEYS[1], 'state', 'attempt', 'asked', 'rows'))
local active = state == 'planning' or state == 'running' or state == 'merging'
local function differs()
  -- Whether the output may be there changes nothing of what is in it.
  return string.gsub(asked, '"overwrite": %a+', '') ~= string.gsub(ARGV[1], '"overwrite": %a+', '')
end
attempt = tonumber(attempt) or 0
if state and ARGV[4] == '0' and state ~= 'finished' then
  if differs() then return {'conflict', attempt, asked} end
  if active then return {state, attempt, ''} end
end
local fresh = not state or ARGV[4] == '1' or state == 'finished'
if fresh then
  call('DEL', KEYS[1], KEYS[2])
  rows = 0
end
call('HSET', KEYS[1], 'state', 'planning', 'attempt', attempt + 1, 'asked', ARGV[1], 'began_at', ARGV[3],
  'before', rows or 0)
call('HDEL', KEYS[1], 'error', 'ended_at')
call('EXPIRE', KEYS[1], ARGV[5])
call('EXPIRE', KEYS[2], ARGV[5])
call('ZADD', KEYS[3], ARGV[3], ARGV[2])
call('EXPIRE', KEYS[3], ARGV[5])
return {'planning', attempt + 1, ''}
